"""The paper's settings for Llama-3.1-8B-Instruct: as configs/paper_qwen2_5_0_5b.py, with another model.

python -m jaxprm run configs/paper_llama3_1_8b.py --workdir runs/paper-8b
python -m jaxprm train configs/paper_llama3_1_8b.py --data trajectories.jsonl --workdir runs/own
"""

from pathlib import Path

import msgspec

from jaxprm.config import load

smaller = load(Path(__file__).with_name("paper_qwen2_5_0_5b.py"))
endpoint = msgspec.structs.replace(smaller.policy.endpoint, model="meta-llama/Llama-3.1-8B-Instruct")
config = msgspec.structs.replace(
    smaller,
    name="paper_llama3_1_8b",
    policy=msgspec.structs.replace(smaller.policy, endpoint=endpoint),
    base_model="meta-llama/Llama-3.1-8B-Instruct",
)
