"""Qwen2.5-0.5B on one chip of 16 GB and trajectories of your own; what notebooks/agentprm_colab_tpu.ipynb trains.

python -m jaxprm train configs/colab.py --data trajectories.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --workdir runs/own

It trains adapters, not all parameters. AdamW's state of 0.49 billion parameters is 5.9 GB, which fits on the chip. But
a checkpoint is as large, three are on the disk at times, and each passes through host memory. A checkpoint of adapters
is 0.1 GB. With reward_models.0.trainable=full use optimizer=adafactor, or a larger disk and host.
"""

from jaxprm.config import DataConfig, Experiment, RewardModelConfig

config = Experiment(
    name="colab",
    data=DataConfig(rows=8, length=2048, steps_per_row=64, too_long="error"),
    reward_models=(
        RewardModelConfig(
            label="agentprm",
            trainable="lora",
            epochs=4,
            learning_rate=1e-4,
            dtype="bfloat16",
            remat="full",
            microbatches=2,
            # By time, not by step: a disconnect loses at most ten minutes of work, however long a step takes.
            checkpoint_every=1_000_000,
            checkpoint_minutes=10.0,
        ),
    ),
)
