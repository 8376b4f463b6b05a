# SPDX-License-Identifier: MIT
"""Faults to plant in copies of the kernels, and the report that each must draw."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from simt.build import CSRC


@dataclass(frozen=True)
class Fault:
    """One replacement in one source file. ``old`` must be there exactly once: refactoring fails loudly."""

    name: str
    file: str  # below csrc
    old: str
    new: str
    kind: str  # the build that is to catch it, see build.KINDS
    report: str  # a regular expression
    cases: str  # a filter of the harness: cases that show it
    sources: tuple[str, ...] = ("soft_argmax2d_float32.cu",)  # what is compiled with the fault in it


@contextmanager
def planted(fault: Fault) -> Iterator[Path]:
    """A copy of csrc with the fault in it."""
    with tempfile.TemporaryDirectory(prefix="kpfused-simt-") as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(CSRC, csrc)
        source = csrc / fault.file
        text = source.read_text()
        if text.count(fault.old) != 1:
            raise AssertionError(
                f"{fault.file} has {text.count(fault.old)} times, not once: {fault.old!r}; mend faults.py"
            )
        source.write_text(text.replace(fault.old, fault.new))
        yield csrc


MEMORY = "AddressSanitizer: heap-buffer-overflow"
BLOCK = "block/float32/1x3x48x64"
TEAM = "team/float32/1x7x7x9"
MOMENTS = "moments/float32/1x5x48x40/border"
SIZED = "moments/float32/1x5x48x40/border/beta-number/dense/moments/mask+size"
TIES = "moments/float32/1x5x96x72/ties"
MOMENT_SOURCES = ("moments_float32.cu",)
EXPECTATION_SOURCES = ("expectation2d.cu",)
VOLUME_SOURCES = ("volumes.cu",)
EXPECTATION = "expectation/float32/2x3x17x31"
SHARED_VALUES = "expectation-shared/float32"

FAULTS = (
    # Barriers.
    Fault(
        name="missing_barrier_seen_by_its_results",
        file="cuda/merge.h",
        old="if (lane == 0) shared[warp] = s;\n  __syncthreads();",
        new="if (lane == 0) shared[warp] = s;",
        kind="asan",
        report="FAILED block/float32",
        cases=BLOCK,
    ),
    Fault(
        name="missing_barrier_seen_by_its_accesses",
        file="cuda/merge.h",
        old="if (lane == 0) shared[warp] = s;\n  __syncthreads();",
        new="if (lane == 0) shared[warp] = s;",
        kind="access",
        report="uninitialised memory: shared memory",
        cases=BLOCK,
    ),
    Fault(
        name="missing_barrier_in_a_tree",
        file="cuda/channels.h",
        old="    }\n    __syncthreads();\n  }",
        new="    }\n  }",
        kind="access",
        report="race: ",
        cases="channels/float32/2x8x16x16",
    ),
    Fault(
        name="barrier_that_some_threads_skip",
        file="cuda/merge.h",
        old="if (lane == 0) shared[warp] = s;\n  __syncthreads();",
        new="if (lane == 0) shared[warp] = s;\n  if (warp == 0) __syncthreads();",
        kind="access",
        report="simt fault: divergent __syncthreads",
        cases=BLOCK,
    ),
    # Shuffles.
    Fault(
        name="wrong_mask",
        file="cuda/merge.h",
        old="float from_lane(float x, int lane_mask) { return __shfl_xor_sync(kAllLanes,",
        new="float from_lane(float x, int lane_mask) { return __shfl_xor_sync(kAllLanes >> 16,",
        kind="access",
        report="simt fault: __shfl_xor_sync",
        cases=BLOCK,
    ),
    Fault(
        name="lanes_return_before_a_shuffle",
        file="cuda/rows.h",
        old="  state = reduce_team(state,",
        new="  if (part.map >= p.view.maps()) return;\n  state = reduce_team(state,",
        kind="access",
        report="simt fault: lanes named by the mask do not arrive.* has exited",
        cases=TEAM,
    ),
    Fault(
        name="half_a_butterfly",
        file="cuda/merge.h",
        old="mask < lanes; mask *= 2",
        new="mask < lanes / 2; mask *= 2",
        kind="access",
        report="FAILED block/float32.*coordinate",
        cases=BLOCK,
    ),
    # Merging.
    Fault(
        name="forgotten_warp",
        file="cuda/merge.h",
        old="lane < team / kWarp",
        new="lane < team / kWarp - 1",
        kind="access",
        report="FAILED block/float32.*coordinate",
        cases=BLOCK,
    ),
    Fault(
        name="merge_without_rescaling",
        file="cuda/merge.h",
        old="m = rebase(s, butterfly(s.peak, lanes, Higher{}), op.scale, Exp2{})",
        new="m = s",
        kind="access",
        report="FAILED block/float32.*coordinate",
        cases=BLOCK,
    ),
    Fault(
        name="forgotten_part",
        file="cuda/merge.h",
        old="i < parts; i += kWarp) state",
        new="i < parts - 1; i += kWarp) state",
        kind="access",
        report="FAILED split/float32.*coordinate",
        cases="split/float32/1x2",
    ),
    Fault(
        name="part_written_behind_the_workspace",
        file="cuda/rows.h",
        old="(p.workspace)[part.item] = state",
        new="(p.workspace)[part.item + 1] = state",
        kind="asan",
        report=MEMORY,
        cases="split/float32/1x2",
    ),
    # Reads and writes outside the map.
    Fault(
        name="row_read_behind_the_map",
        file="cuda/rows.h",
        old="i * ty < rows) pack[i] =",
        new="i * ty <= rows) pack[i] =",
        kind="asan",
        report=f"{MEMORY}.*\n.*READ of size",
        cases=TEAM,
    ),
    Fault(
        name="row_written_behind_the_map",
        file="cuda/rows.h",
        old="if (!kFull && i * ty >= rows) continue;",
        new="if (!kFull && i * ty > rows) continue;",
        kind="asan",
        report=f"{MEMORY}.*\n.*WRITE of size",
        cases=TEAM,
    ),
    Fault(
        name="row_read_behind_the_image",
        file="cuda/channels.h",
        old="part.rows = static_cast<int>(below < plan.rows_per_part ? below : plan.rows_per_part) - ry;",
        new="part.rows = static_cast<int>(below < plan.rows_per_part ? below : plan.rows_per_part) - ry + 1;",
        kind="asan",
        report=f"{MEMORY}.*\n.*READ of size",
        cases="channels/float32/2x8x7x9",
    ),
    Fault(
        name="row_padding_read",
        file="cuda/rows.h",
        old="part.columns = ",
        new="part.columns = 1 + ",
        kind="access",
        report="simt fault: read outside the maps: heatmap",
        cases="views/float32/2x2x7x9/row-pad1",
    ),
    Fault(
        name="rows_beyond_the_end_are_weighed",
        file="cuda/rows.h",
        old="widen(pack[i].value[j]) * sign : -INFINITY",
        new="widen(pack[i].value[j]) * sign : Acc<T>(0)",
        kind="access",
        report="FAILED team/float32.*coordinate",
        cases=TEAM,
    ),
    Fault(
        name="vectors_from_misaligned_addresses",
        file="cuda/launch.h",
        old="reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0",
        new="p != nullptr",
        kind="asan",
        report="runtime error: .*misaligned address",
        cases="views/float32/1x3x8x8",
        sources=("soft_argmax2d.cu", "soft_argmax2d_float32.cu"),
    ),
    Fault(
        name="shared_memory_for_one_warp_too_few",
        file="cuda/launch.h",
        old="(plan.threads / kWarp) : 0",
        new="(plan.threads / kWarp - 1) : 0",
        kind="asan",
        report=MEMORY,
        cases=BLOCK,
    ),
    Fault(
        name="written_by_every_lane",
        file="cuda/rows.h",
        old="if (threadIdx.x % plan.team != 0 || part.map >= p.view.maps()) return;\n  if",
        new="if (part.map >= p.view.maps()) return;\n  if",
        kind="access",
        report="output written twice",
        cases=TEAM,
    ),
    Fault(
        name="offset_of_32_bits",
        file="cuda/element.h",
        old="return n * view.stride_inner;",
        new="return static_cast<int>(n * view.stride_inner);",
        kind="asan",
        report="AddressSanitizer: SEGV|FAILED far/float32",
        cases="far/float32/1x2x7x9/map-stride",
    ),
    # Promises: one read of the map, and the same bits in any company.
    Fault(
        name="map_read_twice",
        file="cuda/rows.h",
        old="  columns.raise(top, beta.scale);",
        new="""  asm volatile("" ::: "memory");
  load_keys<kFull>(p, step, rows, plan.ty, beta.sign, key);
  columns.raise(top, beta.scale);""",
        kind="access",
        report="forward reads the heatmap 2.0+ times",
        cases=BLOCK,
    ),
    Fault(
        name="plan_that_depends_on_the_batch",
        file="cuda/launch.h",
        old="channels ? p.view.inner : 0, vectors,",
        new="channels ? p.view.inner : 0, vectors && p.view.maps() > 1,",
        kind="access",
        report="differs for a map alone, in a copy",
        cases=BLOCK,
        sources=("soft_argmax2d.cu", "soft_argmax2d_float32.cu"),
    ),
    # Wrong results that a loose tolerance would let through.
    Fault(
        name="y_for_x",
        file="cuda/merge.h",
        old="static_cast<A>(p.units.scale_x) * stats.mean_x",
        new="static_cast<A>(p.units.scale_x) * stats.mean_y",
        kind="access",
        report="FAILED team/float32.*coordinate x",
        cases=TEAM,
    ),
    Fault(
        name="a_pixel_off",
        file="cuda/element.h",
        old="static_cast<A>(i) - ",
        new="static_cast<A>(i + 1) - ",
        kind="access",
        report="FAILED team/float32.*coordinate x",
        cases=TEAM,
    ),
    Fault(
        name="gradient_of_zero",
        file="cuda/rows.h",
        old="return map.beta * wq;",
        new="return 0 * wq;",
        kind="access",
        report="FAILED team/float32.*gradient of map",
        cases=TEAM,
    ),
    # Moments.
    Fault(
        name="sums_left_about_the_old_peak",
        file="cuda/moments_rows.h",
        old="    y = w * (y + dy * all);\n    all *= w;",
        new="    y = w * y;\n    all *= w;",
        kind="access",
        report="FAILED .*/moments: (coordinate y|variance of y)",
        cases="block/float32/1x3x47x53/random/beta-per-map/dense/moments",
        sources=MOMENT_SOURCES,
    ),
    Fault(
        name="later_of_two_peaks_in_a_thread",
        file="cuda/moments_rows.h",
        old="if (!(to > peak)) return;\n    int pixel",
        new="if (!(to >= peak)) return;\n    int pixel",
        kind="access",
        report="FAILED .*peak of map",
        cases=TIES,
        sources=MOMENT_SOURCES,
    ),
    Fault(
        name="last_of_two_peaks_of_all_threads",
        file="moments.h",
        old="(b.at_y < a.at_y) |",
        new="(b.at_y > a.at_y) |",
        kind="access",
        report="FAILED .*peak of map",
        cases=TIES,
        sources=MOMENT_SOURCES,
    ),
    Fault(
        name="infinite_distance",
        file="cuda/moments_rows.h",
        old="finite = larger(d, Limits<A>::lowest)",
        new="finite = d",
        kind="access",
        report="FAILED .*entropy of map .*nan",
        cases="values/float32/1x5x48x40/masked/beta-number/dense/moments",
        sources=MOMENT_SOURCES,
    ),
    Fault(
        name="share_of_the_logsumexp_from_every_part",
        file="cuda/moments_rows.h",
        old="static_cast<A*>(p.workspace)[part.item] = dbeta;",
        new="static_cast<A*>(p.workspace)[part.item] = dbeta + grad_beta_of_peak<A>(p, n);",
        kind="access",
        report="FAILED split/float32.*grad_beta of map",
        cases="split/float32/1x2x257x512/random/beta-number/dense/moments",
        sources=MOMENT_SOURCES,
    ),
    Fault(
        name="peak_probability_of_a_neighbour",
        file="cuda/moments_rows.h",
        old="q[j] += j == at ? map.q.at_peak",
        new="q[j] += j == (at ^ 1) ? map.q.at_peak",
        kind="access",
        report="FAILED .*gradient of map",
        cases=MOMENTS,
        sources=MOMENT_SOURCES,
    ),
    # Masks.
    Fault(
        name="mask_ignored_in_the_last_step",
        file="cuda/moments_rows.h",
        old="if (!kFull && !counted.all) hide(bits, A(-INFINITY), key);",
        new="if (!kFull && !counted.all && rows > N * plan.ty) hide(bits, A(-INFINITY), key);",
        kind="access",
        report="FAILED .*moments/mask: coordinate x",
        cases="moments/float32/1x5x7x9/border/beta-number/dense/moments/mask",
        sources=MOMENT_SOURCES,
    ),
    Fault(
        name="vectors_across_masks_of_groups",
        file="cuda/launch.h",
        old="aligned && (!channels || p.pixels.mask_view.even(",
        new="aligned && (channels || p.pixels.mask_view.even(",
        kind="access",
        report="FAILED .*grouped-mask: coordinate x",
        cases="moments/float32/3x18x5x7/channels-last/random/beta-number/dense/moments/grouped-mask",
        sources=("soft_argmax2d.cu", *MOMENT_SOURCES),
    ),
    Fault(
        name="gradient_under_the_mask_multiplied_by_zero",
        file="cuda/moments_channels.h",
        old="if (!counts) dh[j] = 0;",
        new="if (!counts) dh[j] *= 0;",
        kind="access",
        report="FAILED .*gradient of map",
        cases="values/float32/2x5x20x12/channels-last/degenerate",
        sources=MOMENT_SOURCES,
    ),
    Fault(
        name="rows_read_beyond_the_valid_size",
        file="cuda/pixels.h",
        old="c.height = within(size[0], view.height);",
        new="c.height = view.height;",
        kind="access",
        report="FAILED .*reads the heatmap",
        cases=SIZED,
        sources=MOMENT_SOURCES,
    ),
    Fault(
        name="gradient_beyond_the_valid_size_left_unwritten",
        file="cuda/moments_rows.h",
        old="for (; row < rows; row += ty) store",
        new="for (; row < rows - ty; row += ty) store",
        kind="access",
        report="of grad_heatmap unwritten",
        cases=SIZED,
        sources=MOMENT_SOURCES,
    ),
    # Expectations.
    Fault(
        name="missing_barrier_between_threads_of_a_channel",
        file="cuda/channels.h",
        old="mine[j] = s[j];\n  __syncthreads();",
        new="mine[j] = s[j];",
        kind="access",
        report="uninitialised memory: shared memory|race: ",
        cases=f"{EXPECTATION}/channels-last",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="threads_without_a_map_skip_the_sum",
        file="cuda/expectation.h",
        old="  sum = reduce_area(sum, area,",
        new="  if (!area.active) return;\n  sum = reduce_area(sum, area,",
        kind="access",
        report="has exited",
        cases="expectation/float32/2x3x7x9",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="logit_read_behind_the_map",
        file="cuda/softmax.h",
        old="logit[i] = i * ty < rows ?",
        new="logit[i] = i * ty <= rows ?",
        kind="asan",
        report=f"{MEMORY}.*\n.*READ of size",
        cases="expectation/float32/2x3x7x9",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="value_read_behind_the_channels",
        file="cuda/values.h",
        old="v[i][j] = j < channels && i * ty < rows ?",
        new="v[i][j] = j <= channels && i * ty < rows ?",
        kind="asan",
        report=f"{MEMORY}.*\n.*READ of size",
        cases="expectation/float32",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="channels_of_the_second_pass_left_out",
        file="cuda/expectation.h",
        old="if (j >= some) continue;",
        new="if (j >= some || channel > 0) continue;",
        kind="access",
        report="of expectation left unwritten",
        cases="/channels5",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="second_channel_weighed_by_the_gradient_of_the_first",
        file="cuda/expectation_heatmap.h",
        old="g = ones ? A(1) : grad[c + j]",
        new="g = ones ? A(1) : grad[c]",
        kind="access",
        report="FAILED .*grad_heatmap of map",
        cases="expectation/float32",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="value_beside_the_mask_multiplied_by_zero",
        file="cuda/expectation.h",
        old="        w[i] = softmax(w[i]);\n        if (counts[i]) sum",
        new="        w[i] = counts[i] ? softmax(w[i]) : A(0);\n        sum",
        kind="access",
        report="FAILED .*expectation of channel .*nan",
        cases=f"{SHARED_VALUES}/3x5x7x9",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="gradient_beside_the_mask_multiplied_by_zero",
        file="cuda/expectation_heatmap.h",
        old="dh[1] = {counts[i] ? beta * wq : A(0)}",
        new="dh[1] = {beta * wq * A(counts[i])}",
        kind="access",
        report="FAILED .*grad_heatmap.* of map .*nan",
        cases=f"{SHARED_VALUES}/3x5x7x9",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="partial_sum_left_out",
        file="cuda/areas.h",
        old="i < of.parts; i += kWarp",
        new="i < of.parts - 1; i += kWarp",
        kind="access",
        report="FAILED expectation-split.*expectation of channel",
        cases="expectation-split/float32/1x2",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="value_of_an_empty_map_from_every_part",
        file="cuda/expectation.h",
        old="area.part == 0 ? of.pixels.empty_value : 0",
        new="of.pixels.empty_value",
        kind="access",
        report="FAILED expectation-split.*expectation of channel",
        cases="expectation-split/float32/1x5",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="last_map_that_shares_values_left_out",
        file="cuda/expectation_values.h",
        old="w[k] = k < maps ? widen(h[k * near_stride]) : A(0);\n      if (k < maps)",
        new="w[k] = k < maps ? widen(h[k * near_stride]) : A(0);\n      if (k < maps - 1)",
        kind="access",
        report="FAILED .*grad_values element",
        cases=f"{SHARED_VALUES}/3x5x7x9",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="values_of_all_maps_written_by_each",
        file="cuda/expectation_values.h",
        old="  if (values.stride_outer == 0) own.outer = 1;",
        new="",
        kind="access",
        report="written twice: grad_values",
        cases="share-outer",
        sources=EXPECTATION_SOURCES,
    ),
    Fault(
        name="pixel_beside_the_window",
        file="cuda/expectation.h",
        old="  area.clip(box);",
        new="",
        kind="access",
        report="read outside the maps: heatmap",
        cases="expectation-kinds/float32/2x5x24x20/peaked/beta-number/dense/moments/window",
        sources=EXPECTATION_SOURCES,
    ),
    # Volumes.
    Fault(
        name="warp_without_a_volume",
        file="cuda/volumes.cu",
        old="  if (v >= p.volume.view.volumes) return;  // a whole warp\n",
        new="",
        kind="asan",
        report=MEMORY,
        cases="volumes float32 3,1,5",
        sources=VOLUME_SOURCES,
    ),
    Fault(
        name="slice_behind_the_last",
        file="cuda/volumes.cu",
        old="if (n < p.volume.view.slices())",
        new="if (n <= p.volume.view.slices())",
        kind="asan",
        report=MEMORY,
        cases="volumes float32 3,1,5",
        sources=VOLUME_SOURCES,
    ),
    Fault(
        name="volume_written_by_every_lane",
        file="cuda/volumes.cu",
        old="if (lanes.lane == 0) write_volume",
        new="write_volume",
        kind="access",
        report="written twice",
        cases="volumes float32 3,1,5",
        sources=VOLUME_SOURCES,
    ),
    Fault(
        name="slices_beyond_the_first_warp_left_out",
        file="volumes.h",
        old="  VolumeSums<A> sums{};\n  for (int64_t d = team.first(); d < p.view.depth; d += team.step()) {",
        new="  VolumeSums<A> sums{};\n  for (int64_t d = team.first(); d < p.view.depth; d += p.view.depth) {",
        kind="access",
        report="FAILED volumes.*mean",
        cases="volumes float32 3,1,70",
        sources=VOLUME_SOURCES,
    ),
    Fault(
        name="slice_of_the_peak_from_another_lane",
        file="cuda/volumes.cu",
        old="return butterfly(place, kWarp, Higher{});",
        new="return butterfly(place, kWarp / 2, Higher{});",
        kind="access",
        report="FAILED volumes",
        cases="volumes float32 3,1,32",
        sources=VOLUME_SOURCES,
    ),
)
