"""Rebuilds the policy that ships with the package: about an hour on two CPU cores.

python -m jaxprm imitate configs/textcraft_policy.py --workdir runs/policy
"""

from jaxprm.config import DecoderConfig, EnvironmentConfig, Experiment, ImitationConfig, PolicyConfig

config = Experiment(
    name="textcraft_policy",
    environment=EnvironmentConfig(name="textcraft", arguments={"distractors": 4}),
    policy=PolicyConfig(in_flight=64, max_action_tokens=64, max_tokens=896),
    model=DecoderConfig(
        vocab_size=1280, hidden_size=128, layers=4, heads=4, kv_heads=2, head_dim=32, intermediate_size=256
    ),
    imitation=ImitationConfig(
        steps=6_000,
        rows=8,
        length=512,
        learning_rate=2e-3,
        warmup_steps=200,
        demonstrations={
            "invented": 0.6,
            "rename": 0.9,
            "mistakes": 0.3,
            "mistake_rate": 0.15,
            "distractors": [0, 6],
        },
    ),
)
