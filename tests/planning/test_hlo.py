"""Collectives and host transfers in HLO text, by hand."""

from jaxprm.planning.hlo import attention_of, host_transfers, read_communication
from tests.planning.fakes import LOOP


def test_collectives_in_loops_count_once_and_send_in_every_run():
    sends = read_communication(LOOP, 8)
    assert sends.counts == {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 1, "collective-permute": 1}
    assert sends.sent == {
        "all-gather": 3 * 16 * 8 * 2 * 3 / 4,  # three runs, bfloat16, three of four parts come from others
        "reduce-scatter": 3 * 16 * 4 * 3 / 4,
        "all-reduce": 2 * 11 * 4 * 7 / 8,
        "collective-permute": 6 * 4,
    }


def test_asynchronous_forms_count_their_results():
    text = """ENTRY %main (a: f32[4]) -> f32[8] {
  %a = f32[4]{0} parameter(0)
  %start = (f32[4]{0}, f32[8]{0}) all-gather-start(%a), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  %moving = (f32[6,2]{1,0}, f32[6,2]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=2
  ROOT %moved = f32[6,2]{1,0} collective-permute-done(%moving)
}
"""
    sends = read_communication(text, 2)
    assert sends.counts == {"all-gather": 1, "collective-permute": 1}
    assert sends.sent == {"all-gather": 8 * 4 / 2, "collective-permute": 6 * 2 * 4}


def test_a_reduce_scatter_outside_a_fusion_sends_the_array_it_reduces():
    text = """ENTRY %main (a: f32[8]) -> f32[4] {
  %a = f32[8]{0} parameter(0)
  ROOT %r = f32[4]{0} reduce-scatter(%a), channel_id=1, replica_groups={}, dimensions={0}, to_apply=%add
}
"""
    assert read_communication(text, 2).sent == {"reduce-scatter": 8 * 4 / 2}


def test_a_program_for_one_device_sends_nothing():
    sends = read_communication("ENTRY %main (a: f32[8]) -> f32[8] {\n  ROOT %a = f32[8]{0} parameter(0)\n}\n", 1)
    assert (sends.counts, sends.sent) == ({}, {})


def test_transfers_with_the_host_are_detected():
    lines = [
        "  %a = f32[8]{0:T(128)S(5)} copy(%b)",
        "  %c = (f32[], token[]) infeed(%d)",
        "  %e = (f32[], u32[], token[]) send(%f, %g), channel_id=1, is_host_transfer=true",
        '  %h = f32[] custom-call(%i), custom_call_target="xla_ffi_python_cpu_callback"',
        '  %j = f32[8]{0} custom-call(%k), custom_call_target="MoveToHost"',
    ]
    harmless = [
        "  %x = f32[8]{0:T(128)S(1)} copy(%y)",
        '  %z = f32[] custom-call(%y), custom_call_target="tpu_custom_call"',
    ]
    assert host_transfers("\n".join(lines + harmless)) == [line.strip() for line in lines]
    assert host_transfers(LOOP) == []


def test_the_attention_kernel_is_recognized_by_its_name():
    assert attention_of(LOOP) == "splash"
    assert attention_of(LOOP.replace("splash_mha", "other")) == "reference"
