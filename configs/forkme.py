"""A recipe to copy for your own environment and policy. Unchanged, it runs on TextCraft with the shipped policy.

    cp configs/forkme.py configs/mine.py
    python -m jaxprm run configs/mine.py --workdir runs/mine --quick
    python -m jaxprm run configs/mine.py --workdir runs/mine

docs/your-environment.md has a complete small example, docs/concepts.md explains how the fields affect the results.
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
    name="mine",
    # Seeds every draw: the same config and seed give the same trajectories and searches.
    seed=0,
    # A registered name, or "module:attribute" of your own class; `arguments` go to its constructor.
    environment=EnvironmentConfig(name="textcraft", arguments={"distractors": 4}),
    # `path` is a Qwen2, Qwen3 or Llama 3 directory in Hugging Face format; "default" is the shipped TextCraft policy.
    # `endpoint` uses a server instead, and "module:attribute" your own class: see docs/your-policy.md.
    # An action is cut at `max_action_tokens`. An episode longer than `max_tokens` gets only empty actions.
    # `in_flight` episodes run at once: more is faster until memory or the cores are full.
    policy=PolicyConfig(path="default", max_action_tokens=64, max_tokens=896, in_flight=64),
    # None selects all tasks of a split. The reward model learns from differences between attempts at the same task:
    # prefer 16 trajectories of each of fewer tasks, and a policy that succeeds in 10 to 90 % of its attempts.
    collection=CollectionConfig(train_tasks=120, validation_tasks=30, trajectories_per_task=16, temperature=1.0),
    # A batch is `rows` times `length` tokens and at most `steps_per_row` steps a row. Longer trajectories are an
    # "error", "drop"ped, or cut to a "window" of their first steps; shards/metadata.json counts them.
    data=DataConfig(rows=8, length=512, steps_per_row=32, too_long="window"),
    # All are trained on the same trajectories, from the policy's weights. A label names files and curves.
    reward_models=(
        RewardModelConfig(
            label="agentprm", objective="agentprm", beta=1.0, gae_lambda=0.95, epochs=2, learning_rate=3e-4
        ),
        RewardModelConfig(label="agentprm_no_progress", objective="agentprm", beta=0.0, epochs=2, learning_rate=3e-4),
        RewardModelConfig(label="pvm", objective="pvm", beta=0.0, epochs=2, learning_rate=3e-4),
    ),
    # One reward model per seed. From two seeds on, intervals include the variance of training. Use three or more.
    reward_seeds=(0,),
    # An environment with fork = "none" needs beams=(), because a beam returns to earlier states.
    # Choose between settings with split="validation"; evaluate on test once.
    search=SearchConfig(
        split="test",
        tasks=60,
        temperature=0.7,
        pool=16,
        best_of_n=(1, 2, 4, 8, 16),
        prefix_steps=3,
        prefix_best_of_n=(1, 2, 4, 8, 16),
        beams=((2, 2), (4, 4)),
        stepwise=(4,),
        # Other searches, as pairs like the beams, and other scores for best-of-N: see docs/search.md.
        diverse=(),
        mcts=(),
        aggregations=(),
    ),
)

# The config of --quick: the full loop at a size that only shows that it runs.
quick = msgspec.structs.replace(
    config,
    collection=CollectionConfig(train_tasks=6, validation_tasks=4, trajectories_per_task=4),
    reward_models=tuple(msgspec.structs.replace(model, epochs=1) for model in config.reward_models),
    search=SearchConfig(
        tasks=4, pool=4, best_of_n=(1, 2, 4), prefix_best_of_n=(1, 2, 4), beams=((2, 2),), stepwise=(2,), trees=2
    ),
    bootstrap_samples=200,
)
