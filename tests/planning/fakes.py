"""A slice of this machine's CPUs, and a compiler that answers at once instead of the TPU compiler."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax

from jaxprm import config as config_lib
from jaxprm.model.config import TransformerConfig
from jaxprm.planning import plan as plan_lib
from jaxprm.planning.compiling import Compilation, Memory
from jaxprm.planning.plan import Slice, SliceEstimate, make_plan

TINY = TransformerConfig(vocab_size=96, hidden_size=16, layers=3, heads=4, kv_heads=2, head_dim=8, intermediate_size=40)
# A loop of 3 runs: an asynchronous gather in two fusions of one channel, and a reduce-scatter as TPU programs write it.
LOOP = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%begin (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%end (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0:T(8,128)} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%all-reduce-scatter.3.clone (q: f32[16]) -> f32[4] {
  %q = f32[16]{0} parameter(0)
  %all-reduce.9 = f32[16]{0} all-reduce(%q), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %part = f32[4]{0} dynamic-slice(%all-reduce.9, %q), dynamic_slice_sizes={4}
}

%body (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %t = (s32[], bf16[4,8]{1,0}) parameter(0)
  %start = bf16[16,8]{1,0} fusion(%t), kind=kCustom, calls=%begin
  %kernel = bf16[4]{0} custom-call(%t), custom_call_target="tpu_custom_call", kernel_metadata={
}}, metadata={op_name="splash_mha_fwd_segmented_residuals"}
  %done = bf16[16,8]{1,0} fusion(%t), kind=kCustom, calls=%end
  %scattered = f32[4]{0} fusion(%t), kind=kCustom, calls=%all-reduce-scatter.3.clone
}

%condition (u: (s32[], bf16[4,8])) -> pred[] {
  %u = (s32[], bf16[4,8]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%u, %limit), direction=LT
}

ENTRY %main (a: bf16[4,8]) -> f32[] {
  %a = bf16[4,8]{1,0} parameter(0)
  %loop = (s32[], bf16[4,8]{1,0}) while(%a), condition=%condition, body=%body
  %all-reduce.2 = (f32[10]{0}, f32[]{:T(128)}) all-reduce(%a, %a), channel_id=9, replica_groups=[1,8]<=[8]
  ROOT %permuted = f32[6]{0} collective-permute(%a), channel_id=10, source_target_pairs={{0,1},{1,0}}
}
"""
MEMORY = Memory(arguments=7, outputs=6, aliased=5, temporaries=40, program=2, total=50, limit=64)


def compiles(memory: Memory = MEMORY, text: str = LOOP, refused: str = ""):
    """A fake `compile_ahead` with a fixed result; it records its arguments in `calls`."""

    def compile_ahead(function, *shapes, limit):
        compile_ahead.calls.append(SimpleNamespace(function=function, shapes=shapes, limit=limit))
        return Compilation(memory, 12.34, "" if refused else text, refused)

    compile_ahead.calls = []
    return compile_ahead


def too_large(memory: Memory = MEMORY):
    """A fake compiler that refuses every program as too large."""
    refusal = dataclasses.replace(memory, outputs=None, aliased=None, temporaries=None, program=None, total=80)
    return compiles(refusal, refused="RESOURCE_EXHAUSTED: Ran out of memory")


def here() -> Slice:
    return Slice("v5e:1x1", tuple(jax.devices()[:1]), MEMORY.limit)


def fake_plan(monkeypatch, compiler, model, **settings) -> SliceEstimate:
    monkeypatch.setattr(plan_lib, "compile_ahead", compiler)
    data = config_lib.DataConfig(rows=2, length=128, steps_per_row=4)
    return make_plan(here(), config_lib.RewardModelConfig(label="x", **settings), data, config_lib.MeshConfig(), model)
