"""The paper's settings for Qwen2.5-7B-Instruct: as configs/paper_qwen2_5_0_5b.py, with another model.

python -m jaxprm run configs/paper_qwen2_5_7b.py --workdir runs/paper-7b
python -m jaxprm train configs/paper_qwen2_5_7b.py --data trajectories.jsonl --workdir runs/own
"""

from pathlib import Path

import msgspec

from jaxprm.config import load

smaller = load(Path(__file__).with_name("paper_qwen2_5_0_5b.py"))
endpoint = msgspec.structs.replace(smaller.policy.endpoint, model="Qwen/Qwen2.5-7B-Instruct")
config = msgspec.structs.replace(
    smaller,
    name="paper_qwen2_5_7b",
    policy=msgspec.structs.replace(smaller.policy, endpoint=endpoint),
    base_model="Qwen/Qwen2.5-7B-Instruct",
)
