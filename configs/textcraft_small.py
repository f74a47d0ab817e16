"""The demo at the size that gives tight intervals: all tasks, pools of 128, every beam size, three seeds.

Takes hours on two CPU cores, and resumes if it is killed and started again. To run one seed first and the others later
in the same directory:

python -m jaxprm run configs/textcraft_small.py 'reward_seeds=[0]' --workdir runs/small
python -m jaxprm run configs/textcraft_small.py --workdir runs/small
"""

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
    name="textcraft_small",
    environment=EnvironmentConfig(name="textcraft", arguments={"distractors": 4, "max_rounds": 12}),
    policy=PolicyConfig(path="default", in_flight=128, max_action_tokens=64, max_tokens=896),
    collection=CollectionConfig(trajectories_per_task=16),
    data=DataConfig(rows=8, length=512, steps_per_row=32, too_long="window"),
    reward_models=(
        RewardModelConfig(label="agentprm", objective="agentprm", epochs=1, evaluate_every=200),
        RewardModelConfig(label="pvm", objective="pvm", beta=0.0, epochs=1, evaluate_every=200),
        RewardModelConfig(label="orm", objective="orm", beta=0.0, epochs=1, evaluate_every=200),
        RewardModelConfig(label="agentprm_no_progress", objective="agentprm", beta=0.0, epochs=1, evaluate_every=200),
    ),
    reward_seeds=(0, 1, 2),
    search=SearchConfig(
        pool=128,
        best_of_n=(1, 2, 4, 8, 16, 32, 64, 128),
        prefix_best_of_n=(1, 2, 4, 8, 16, 32, 64, 128),
        beams=((2, 2), (4, 4), (8, 8)),
        stepwise=(2, 4, 8),
    ),
)
