"""The demo: a small agent on TextCraft, its reward models, and their evaluation. Takes minutes on two CPU cores.

python -m jaxprm run configs/textcraft_tiny.py --workdir runs/demo
python -m jaxprm run configs/textcraft_tiny.py --workdir runs/quick --quick
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

config = Experiment(
    name="textcraft_tiny",
    # Minutes, not hours: the same tasks with four distractors instead of AgentGym's ten, and 12 rounds instead of 20.
    environment=EnvironmentConfig(name="textcraft", arguments={"distractors": 4, "max_rounds": 12}),
    policy=PolicyConfig(path="default", in_flight=64, max_action_tokens=64, max_tokens=896),
    collection=CollectionConfig(train_tasks=64, validation_tasks=20, trajectories_per_task=16),
    data=DataConfig(rows=8, length=512, steps_per_row=32, too_long="window"),
    reward_models=(
        RewardModelConfig(label="agentprm", objective="agentprm", epochs=2, evaluate_every=80),
        RewardModelConfig(label="pvm", objective="pvm", beta=0.0, epochs=2, evaluate_every=80),
        RewardModelConfig(label="orm", objective="orm", beta=0.0, epochs=2, evaluate_every=80),
    ),
    search=SearchConfig(tasks=48, pool=16, best_of_n=(1, 2, 4, 8, 16), beams=((2, 2), (4, 4)), stepwise=(4,)),
)

quick = msgspec.structs.replace(
    config,
    name="textcraft_quick",
    policy=msgspec.structs.replace(config.policy, in_flight=16),
    collection=CollectionConfig(train_tasks=6, validation_tasks=4, trajectories_per_task=4),
    reward_models=tuple(msgspec.structs.replace(model, epochs=1) for model in config.reward_models),
    search=SearchConfig(
        tasks=4, pool=4, best_of_n=(1, 2, 4), prefix_best_of_n=(1, 2, 4), beams=((2, 2),), stepwise=(2,), trees=2
    ),
    bootstrap_samples=200,
)
