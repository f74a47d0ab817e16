"""The paper's settings (arXiv 2511.08325, Algorithm 1 and its experiments) for Qwen2.5-0.5B-Instruct.

The policy is served by any OpenAI-compatible server of that model, fine-tuned or not; the reward models start from the
model itself. The full loop on AgentGym's TextCraft, or only training on your own trajectories:

python -m jaxprm run configs/paper_qwen2_5_0_5b.py --workdir runs/paper-0.5b
python -m jaxprm train configs/paper_qwen2_5_0_5b.py --data trajectories.jsonl --workdir runs/own-0.5b

The paper gives 16 trajectories per query at temperature 1.0, up to 5 epochs, learning rate 1e-6, beta 1.0, lambda 0.95,
and searches at temperature 0.7. It does not give the batch, the warmup, the weight decay or the learning rate
of the head: those are ours. On one chip use reward_models.0.microbatches=16, and so on for each model; docs/training.md
lists other ways to save memory.
"""

from jaxprm.config import (
    CollectionConfig,
    DataConfig,
    EndpointConfig,
    EnvironmentConfig,
    Experiment,
    MeshConfig,
    PolicyConfig,
    RewardModelConfig,
    SearchConfig,
)


def reward_model(label: str, objective: str, beta: float) -> RewardModelConfig:
    return RewardModelConfig(
        label=label,
        objective=objective,
        beta=beta,
        gae_lambda=0.95,
        epochs=5,
        learning_rate=1e-6,
        head_multiplier=100.0,
        weight_decay=0.0,
        dtype="bfloat16",
        remat="full",
        microbatches=2,
        evaluate_every=200,
        checkpoint_every=200,
        checkpoint_minutes=15.0,
        keep_best=1,
    )


config = Experiment(
    name="paper_qwen2_5_0_5b",
    environment=EnvironmentConfig(name="textcraft"),  # ten distractors and twenty rounds
    policy=PolicyConfig(
        endpoint=EndpointConfig(model="Qwen/Qwen2.5-0.5B-Instruct"),
        max_action_tokens=256,
        max_tokens=4096,
        in_flight=128,
    ),
    base_model="Qwen/Qwen2.5-0.5B-Instruct",
    collection=CollectionConfig(trajectories_per_task=16, temperature=1.0),
    data=DataConfig(rows=16, length=4096, steps_per_row=128, too_long="window"),
    reward_models=(
        reward_model("agentprm", "agentprm", 1.0),
        reward_model("agentprm_no_progress", "agentprm", 0.0),
        reward_model("pvm", "pvm", 0.0),
        reward_model("orm", "orm", 0.0),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
    search=SearchConfig(
        temperature=0.7,
        pool=64,
        best_of_n=(1, 2, 4, 8, 16, 32, 64),
        prefix_best_of_n=(1, 2, 4, 8, 16, 32, 64),
        beams=((2, 2), (4, 4), (8, 8)),
        stepwise=(4, 8),
    ),
)
