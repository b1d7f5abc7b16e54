"""Which fast tests answer for which file of the library, for edits drawn at random."""

from __future__ import annotations

from pathlib import Path

from mutation_run import FLOORS

RING = "test_ring.py -k 'ring_matches_oracle or uneven or density or recall or selection'"
HUGGINGFACE = "test_huggingface.py -k 'not gpu and not compiled and not wrapped'"
FUNCTIONAL = "test_functional.py -k 'not gpu and not package'"
TRITON = "test_triton.py -k 'matches_specification and (packed or sinks or h4 or block16 or float)'"
HEADS = "test_heads.py -k 'every_way or batches or bytes or work or rounded or parts'"

TESTS = {
    "kernels/triton_backward.py": TRITON,
    "kernels/triton_columns.py": TRITON,
    "kernels/triton_forward.py": TRITON,
    "kernels/hopper": "",  # runs on a GPU only
    "kernels/triton_estimates.py": "test_estimates.py -k 'fp64 and (ragged or packed or prefix)'",
    "kernels/triton_lists.py": "test_lists.py",
    "kernels/triton_order.py": "test_lists.py -k 'column or work or longest'",
    "kernels/triton_select.py": "test_estimates.py -k 'top_k or threshold or tiles_of'",
    "kernels/estimates.py": "test_patterns.py",
    "kernels/select.py": "test_patterns.py",
    "kernels/columns.py": RING,
    "kernels/patterns/": "test_patterns.py",
    "kernels/": "test_attend.py -k 'not gradcheck'",
    "balance/layout.py": "test_balance_layout.py",
    "balance/schedule.py": "test_balance_schedule.py",
    "balance/hops.py": "test_hops.py -k 'bring or everybody or window'",
    "balance/lever.py": "test_lever.py",
    "balance/simulate.py": "test_simulate.py",
    "balance/topology.py": "test_simulate.py",
    "balance/by_heads.py": "test_by_heads.py",
    "balance/": "test_balance_planner.py",
    "cp/functional.py": FUNCTIONAL,
    "cp/huggingface.py": HUGGINGFACE,
    "cp/attach.py": FUNCTIONAL,
    "cp/loss.py": FUNCTIONAL,
    "cp/batch.py": FUNCTIONAL + " test_bad_input.py",
    "cp/context_parallel.py": "test_bad_input.py test_auto_layout.py test_trace.py",
    "cp/agreement.py": "test_gloo.py -k shard_proves",
    "cp/call.py": "test_bad_input.py " + RING,
    "cp/exchange.py": "test_auto_exchange.py",
    "cp/planning.py": "test_auto_layout.py test_auto_exchange.py",
    "cp/record.py": "test_auto_layout.py test_step_report.py " + RING,
    "cp/report.py": "test_step_report.py",
    "cp/coverage.py": "test_coverage.py",
    "cp/finite.py": "test_finite.py",
    "cp/isolated.py": "test_tensors.py",
    "cp/errors.py": "test_faults.py -k 'say_where or debug_proves'",
    "cp/link.py": "test_faults.py -k 'debug_proves or straggler'",
    "cp/rotary.py": "test_rotary.py",
    "cp/verify.py": "test_trace.py -k verify",
    "cp/mesh.py": "test_gloo.py -k 'groups or subgroup'",
    "cp/transport.py": "test_gloo.py -k 'oracle or subgroup or proves'",
    "cp/heads.py": HEADS,
    "cp/swap.py": HEADS,
    "cp/part.py": HEADS,
    "cp/pull.py": "test_pull.py",
    "cp/rows.py": "test_pull.py",
    "cp/windows.py": "test_windows.py",
    "cp/symmetric.py": "",  # runs on GPUs only
    "cp/move.py": "test_lever.py",
    "cp/hops.py": "test_hops.py",
    "cp/": RING,
    "launch/checkpoint.py": "test_checkpoint.py test_checkpoint_sharded.py",
    "launch/manifest.py": "test_checkpoint.py",
    "launch/shards.py": "test_checkpoint.py test_checkpoint_sharded.py",
    "launch/tree.py": "test_checkpoint.py",
    "launch/gather.py": "test_checkpoint_sharded.py",
    "launch/saver.py": "test_checkpoint.py",
    "launch/signals.py": "test_interrupt.py",
    "launch/export.py": "test_export.py",
    "launch/optimizer.py": "test_launch_optimizer.py",
    "launch/trainee.py": "test_launch_optimizer.py",
    "launch/model.py": "test_launch_model.py",
    "launch/memory.py": "test_launch_model.py",
    "launch/flops.py": "test_measure.py",
    "launch/measure.py": "test_measure.py",
    "launch/progress.py": "test_report.py",
    "launch/page.py": "test_page.py",
    "launch/compare.py": "test_page.py",
    "launch/nonfinite.py": "test_nonfinite.py",
    "launch/trackers.py": "test_trackers.py",
    "launch/environment.py": "test_trackers.py",
    "launch/profiling.py": "test_trackers.py",
    "launch/flight.py": "test_flight.py",
    "launch/parallel.py": "test_launch_model.py",
    "launch/config.py": "test_config.py",
    "launch/data.py": "test_data.py",
    "launch/packing.py": "test_data.py",
    "launch/documents.py": "test_documents.py",
    "launch/tokens.py": "test_corpus.py",
    "launch/corpus.py": "test_corpus.py",
    "launch/prefetch.py": "test_prefetch.py",
    "launch/metrics.py": "test_report.py",
    "launch/summary.py": "test_report.py",
    "launch/report.py": "test_report.py",
    "launch/pictures.py": "test_report.py",
    "launch/": "test_train.py -k 'resumed or groups or default'",
}


def tests_of(file: str) -> str:
    """The tests of the longest entry that the file begins with."""
    return TESTS[max((start for start in TESTS if file.startswith(start)), key=len)]


def files_of(library: Path) -> list[str]:
    """All files that an edit may fall on: those with tests that run here."""
    paths = [path for floor in FLOORS for path in sorted((library / floor).rglob("*.py"))]
    files = [str(path.relative_to(library)) for path in paths if path.name != "__init__.py"]
    return [file for file in files if tests_of(file)]
