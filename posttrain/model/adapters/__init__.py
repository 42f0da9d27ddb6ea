"""What an adapter may reach, and adapters of other tools that are no LoRA. posttrain/model/roles.py runs adapters."""
