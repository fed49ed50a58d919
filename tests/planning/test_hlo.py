"""Collectives and cycles, read from compiled text: by hand, and against what was written."""

import pytest

from jaxmllm.planning.hlo import Collective, read_hlo

# Two loops, one in the other: the inner one runs 5 times, the outer one as long as data says.
TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %y = bf16[]{:T(256)} parameter(1)
  %x = bf16[]{:T(256)} parameter(0)
  ROOT %sum = bf16[]{:T(256)} add(%x, %y)
}

%gathering (p: bf16[2,128]) -> bf16[8,128] {
  %p = bf16[2,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, backend_config={"window_config":{"estimated_cycles":"999"}}
}

%inner_body (s: (s32[], bf16[4,1024])) -> (s32[], bf16[4,1024]) {
  %s = (s32[]{:T(128)}, bf16[4,1024]{1,0:T(4,128)(2,1)S(1)}) parameter(0)
  %v = bf16[4,1024]{1,0:T(4,128)(2,1)S(1)} get-tuple-element(%s), index=1
  %all-reduce.1 = bf16[4,1024]{1,0:T(4,128)(2,1)S(1)} all-reduce(%v), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %fusion.1 = bf16[8,128]{1,0} fusion(%v), kind=kCustom, calls=%gathering, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[], bf16[4,1024]) tuple(%v)
}

%inner_condition (s.1: (s32[], bf16[4,1024])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %s.1 = (s32[]{:T(128)}, bf16[4,1024]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %five), direction=LT
}

%outer_body (o: (s32[], bf16[4,1024])) -> (s32[], bf16[4,1024]) {
  %o = (s32[], bf16[4,1024]) parameter(0)
  %while.1 = (s32[]{:T(128)}, bf16[4,1024]{1,0}) while(%o), condition=%inner_condition, body=%inner_body
  %collective-permute-start.1 = (bf16[16]{0}, bf16[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%o), source_target_pairs={{0,1},{1,0}}
  ROOT %collective-permute-done.1 = bf16[16]{0} collective-permute-done(%collective-permute-start.1)
}

%outer_condition (o.1: (s32[], bf16[4,1024])) -> pred[] {
  %o.1 = (s32[], bf16[4,1024]) parameter(0)
  %all-reduce.2 = u32[]{:T(128)} all-reduce(%o.1), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, to_apply=%add
  ROOT %done = pred[]{:T(512)} and(%all-reduce.2, %all-reduce.2)
}

ENTRY %main (x.1: bf16[4,1024]) -> bf16[4,1024] {
  %x.1 = bf16[4,1024]{1,0} parameter(0)
  %fusion.2 = bf16[4,1024]{1,0} fusion(%x.1), kind=kLoop, calls=%add, backend_config={"window_config":{"estimated_cycles":"7"}}
  %kernel = bf16[4,1024]{1,0} custom-call(%x.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="kernel"}
  ROOT %while.2 = (s32[]{:T(128)}, bf16[4,1024]{1,0}) while(%fusion.2), condition=%outer_condition, body=%outer_body
}
"""  # noqa: E501  as a compiler writes it


def test_loops_are_multiplied_out():
    reading = read_hlo(TEXT, steps=3)
    assert reading.cycles == 7 + 3 * 5 * 100  # what is inside a fusion is part of it
    assert reading.kernels == 1
    assert set(reading.collectives) == {
        Collective("all-reduce", 4, 15, 15 * 4 * 1024 * 2),
        Collective("all-gather", 4, 15, 15 * 8 * 128 * 2),
        Collective("collective-permute", 2, 3, 3 * 16 * 2),
        Collective("all-reduce", 2, 4, 4 * 4),  # a condition is asked once more than its body runs
    }


def test_what_takes_most_bytes_comes_first():
    sizes = [each.size for each in read_hlo(TEXT).collectives]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("kind", "group", "sent"),
    [("all-reduce", 4, 150.0), ("all-gather", 4, 75.0), ("reduce-scatter", 4, 75.0), ("collective-permute", 2, 100.0)],
)
def test_bytes_sent_around_a_ring(kind, group, sent):
    assert Collective(kind, group, 1, 100).sent() == sent


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read_hlo("HloModule nothing\n")
