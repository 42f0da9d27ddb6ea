"""What makes the commands of the README and docs small enough to be run, and why some are not.

Options are added behind a command, where they win: those of its kind (`posttrain grpo`, or a module), then those for a
part of its text.
"""

EVAL = ["--eval.prompts", "1", "--eval.steps", "2", "--eval.groups", "0"]
GROUPS = ["--groups.prompts_per_step", "1", "--groups.group_size", "3"]
SMALL = {
    "grpo": [*EVAL, *GROUPS, "--steps", "1", "--sampling.steps", "4"],
    "nft": [
        *EVAL, *GROUPS, "--steps", "1", "--sampling.steps", "4", "--loss.levels", "all", "--loss.times", "2",
    ],
    "preflight": [*EVAL, *GROUPS, "--sampling.steps", "4"],
    "pairs": ["--pairs", "5", "--steps", "2", "--block", "5", "--min_distance", "0", "--rewards", "[]"],
    "stpo": [
        *EVAL, "--steps", "1", "--batch", "2", "--micro_batch", "2", "--pairs.heldout", "0.5", "--pairs.measured", "4",
    ],
    "sft": [*EVAL, "--steps", "1", "--batch", "2", "--micro_batch", "2", "--images.measured", "4"],
    "mopd": [*EVAL, "--steps", "1", "--images", "2", "--micro_batch", "2", "--sampling.steps", "4"],
    "style": [
        *EVAL, "--steps", "1", "--batch", "2", "--micro_batch", "2", "--images.measured", "4", "--sweep", "[1]",
    ],
    "tdm": [*EVAL, "--steps", "2", "--batch", "2", "--micro_batch", "2", "--fake.warmup", "1"],
    "sample": ["--steps", "1"],
    "evaluate": ["--steps", "1", "--first", "2", "--images", "1", "--least_change", "{}"],
    "judge": ["--steps", "1", "--batch", "4", "--micro_batch", "4", "--workers", "0"],
    "expander data": ["--count", "40"],
    "expander sft": ["--steps", "1", "--batch", "4", "--micro_batch", "4", "--measured", "4"],
    "expander gdpo": [
        *GROUPS, "--steps", "1", "--groups.micro_batch", "3", "--generation.max_tokens", "24", "--renderer.steps", "1",
        "--eval.prompts", "1", "--eval.group_size", "2", "--eval.shown", "1",
    ],
    "expander mine": [
        "--group_size", "3", "--batch", "4", "--heldout", "0.97", "--renderer.steps", "1", "--generation.max_tokens",
        "24", "--low", "0", "--high", "1", "--spread", "0",
    ],
    "expand": ["--n", "2", "--max_tokens", "24", "--dtype", "float32"],
    "export": [],
    "merge": ["--images", "2"],
    "extract": [],
    "export --check": ["--images", "2", "--steps", "2", "--turbo_steps", "1"],
    "annotations": [],
    "report": [],
    "bench": ["--methods", "[rollout,grpo]", "--repeats", "1", "--stock", "false", "--warmup", "2"],
    "posttrain.pipeline.ranks": [],
    "posttrain.nano.world.many_styles": ["--images", "24", "--heldout", "4"],
    "posttrain.nano.bench.style": ["--prompts", "4", "--steps", "1"],
    "posttrain.nano.world.one_style": ["--images", "24", "--heldout", "4"],
    "posttrain.nano.world.judge_data": ["--pairs", "24", "--faults", "24"],
}  # fmt: skip
MORE = {
    "recipes/nano/style_pairs.yaml": [
        "--sources", '[{"name": "guidance", "delta": {"stronger": {"guidance": 1.5}, "weaker": {}}}]',
    ],
    "--data runs/nano-choices": ["--heldout", "0.5", "--batch", "2", "--micro_batch", "2"],
    "bench --plan": ["--measured", "runs/tiny/bench.json"],
    "--model.path RAW": [
        "--model.path", "posttrain/nano/weights/k2-nano", "--model.dtype", "float32", "--size", "[64, 64]",
        "--prompts", "prompts/nano/heldout.jsonl",
    ],
}  # fmt: skip
"""By a part of the command's text."""

SCALE = "at K2's true size, which no CPU holds; "
NOT_RUN = {
    "posttrain evaluate base grpo=": "K2 and a server; the command is run on K2-nano",
    "make demo": (
        "makes an environment; its command: tests/test_project.py::"
        "test_the_demo_runs_the_nano_pipeline_by_torchrun_on_the_cpu"
    ),
    "python examples/draw_and_score.py": "tests/test_examples.py::test_draw_and_score",
    "python examples/score_folder.py": "tests/test_examples.py::test_a_folder_is_scored",
    "python examples/reward_weighted_regression.py": (
        "tests/test_examples.py::test_the_adapter_moves_and_is_exported_and_sampled"
    ),
    "rewards/make_vllm_env.sh": "installs vLLM, as make test does",
    "posttrain run recipes/nano/pipeline.yaml --resume": (
        "minutes; its stages run here, by their recipes: tests/pipeline/test_pipeline.py::"
        "test_a_pipeline_that_was_killed_ends_as_one_that_was_not"
    ),
    "posttrain run recipes/nano/pipeline.yaml": (
        "minutes; its stages run here, by their recipes: tests/pipeline/test_pipeline.py::"
        "test_stages_follow_each_other_and_are_done_once"
    ),
    "posttrain preflight --config recipes/k2/grpo.yaml": SCALE + "tests/pipeline/test_pipeline_fit.py::"
    "test_each_k2_recipe_belongs_to_a_pipeline",
    "posttrain run recipes/k2/pipeline.yaml": SCALE + "tests/pipeline/test_pipeline_fit.py::"
    "test_a_pipeline_of_k2_resolves_without_weights",
    "posttrain serve --config recipes/nano/grpo.yaml": (
        "wants vLLM and ends with Ctrl-C: tests/judge/test_serve_command.py::test_command_serves_until_it_is_stopped"
    ),
    "OMP_NUM_THREADS=1 posttrain grpo --config recipes/nano/grpo.yaml": (
        "wants vLLM: tests/rewards/test_serve.py::test_a_run_says_how_far_its_judges_repeat_themselves"
    ),
    "vllm serve": "wants vLLM: tests/expander/test_expander_vllm.py::test_vllm_serves_the_adapter_as_it_is",
    "posttrain judge --config recipes/nano/judge_artifact.yaml --data runs/faults": (
        "wants a person's marks of many images:"
        " tests/annotate/test_marked_images.py::test_marks_become_what_the_judge_reads"
    ),
    "posttrain expander serve": (
        "serves until it is stopped: tests/expander/test_endpoint.py::test_the_command_serves_until_it_is_stopped"
    ),
    "posttrain annotate ": "serves until it is stopped: tests/annotate/test_annotate.py::test_whole_session",
    "posttrain style play": "serves until it is stopped: tests/style/test_play.py::test_strengths_are_dragged",
    "torchrun --nproc-per-node 2 -m posttrain.cli bench": (
        "two GPUs; torchrun is started by tests/distributed/test_processes.py::test_four_processes_equal_two_and_one"
    ),
    "srun": "a cluster: tests/distributed/test_sharding.py::test_launching",
    "accelerate launch": "several GPUs or machines: tests/distributed/test_sharding.py::test_launching",
    "posttrain bench --output runs/bench": SCALE + "tests/bench/test_bench.py::test_bench_and_plans",
    "posttrain bench --sizes": SCALE
    + "tests/bench/test_estimate.py::test_the_shipped_form_of_a_bench_gives_the_same_plan",
    "python -m posttrain.bench.measurement": "tests/bench/test_estimate.py, which writes to no file of the package",
    "posttrain grpo --config recipes/k2/grpo.yaml --sampling.sizes": SCALE
    + "tests/bench/test_estimate.py::test_what_is_scaled_says_so",
    "posttrain stpo --config recipes/k2/stpo_synthetic.yaml --micro_batch": SCALE
    + "tests/bench/test_estimate.py::test_what_is_scaled_says_so",
    "posttrain tdm --config recipes/k2/tdm.yaml --sizes": SCALE
    + "tests/bench/test_estimate.py::test_what_is_scaled_says_so",
    "posttrain bench --methods": SCALE + "tests/bench/test_bench.py::test_bench_and_plans",
    "python -m posttrain.bench.references": SCALE + "tests/bench/test_bench.py runs it on a small model",
    "python -m posttrain.bench.checkpoint": SCALE + "tests/training/test_checkpoint.py checks its parts",
    "python -m posttrain.nano.bench.merge": "dozens of runs and merges, which tests/merge/test_merge.py makes too",
    "python -m posttrain.nano.bench.grpo": "dozens of runs of posttrain grpo, whose recipes run here",
    "python -m posttrain.nano.bench.methods": "a dozen runs of posttrain grpo, nft and sft, whose recipes run here",
    "python -m posttrain.nano.bench.noise": "six runs of posttrain grpo, whose recipe runs here",
    "python -m posttrain.nano.bench.sft": "three runs of posttrain sft, whose recipe runs here",
    "python -m posttrain.nano.bench.stpo": "dozens of runs of posttrain pairs and stpo, whose recipes run here",
    "python -m posttrain.nano.bench.expander_stages": "runs of the expander's commands, whose recipes run here",
    "python -m posttrain.nano.bench.expander": "runs of posttrain expander sft and gdpo, whose recipes run here",
    "python -m posttrain.nano.bench.pipeline": "runs of the nano pipeline, whose recipes run here",
    "python -m posttrain.nano.bench.muon_adamw": (
        "an hour of a core: tests/nano/test_bench_optimizers.py::test_a_short_comparison"
    ),
    "python -m posttrain.nano.bench.tdm": "the teacher's 56 forwards an image, minutes of a GPU",
    "python -m posttrain.nano.bench.speed": "twelve minutes of two quiet cores, and the history of the repository",
    "python -m posttrain.nano.build.evaluate": "500 images by the stock pipeline, minutes of a GPU",
    "python -m posttrain.nano.build.build ": "minutes of a GPU",
    "python -m posttrain.nano.build.judge": "minutes of a GPU: tests/judge/test_judge_nano.py::test_training_learns",
    "python -m posttrain.nano.build.expander": "minutes of a core",
}
"""Beginnings of commands, with the reason and, after a colon, the test that stands in for them. The first that fits."""
