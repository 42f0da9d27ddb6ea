"""Post-training for Krea 2 (K2).

recipe -> model -> rollout -> rewards -> advantages -> loss -> checkpoint -> export
"""

import logging

__version__ = "0.1.0"

# torchao, where it is installed, has these warn, at any import of diffusers, of what nothing here uses.
for _name in ("torchao", "diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# DeepSpeed, where it is installed, is imported by others, sets its own level and prints to stdout what device it found.
logging.getLogger("DeepSpeed").addFilter(
    lambda entry: entry.levelno >= logging.WARNING and not entry.getMessage().startswith("Setting accelerator")
)
