"""Faults that the suite must find: small changes of the source, and the tests that see them.

`find` stands once in the file; a fault whose text is gone is an error of this list. Tests are named
as few and as small as show the fault; all of them pass without it.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A change of the source that some tests must fail on.

    Attributes:
        why: what is wrong then.
        file: path in the checkout.
        find, put: the text, and what takes its place.
        tests: what pytest is given; at least one of them fails.
    """

    why: str
    file: str
    find: str
    put: str
    tests: tuple[str, ...]


METHODS = "tests/contract/test_methods.py::"
WHOLE = "tests/contract/test_whole_matrices.py::"
FEEDS = "tests/contract/test_feeds.py::"
FOURBIT = "tests/unit/test_fourbit.py::"
KERNELS = "tests/kernels/test_kernels.py::"
FORMATS = "tests/kernels/test_kernel_formats.py::"
LENGTHS = "tests/kernels/test_length_kernels.py::"
KEPT = "tests/contract/test_length_states.py::"
SHARDED = "tests/sharded/test_sharded.py::"

FAULTS = {
    # Moments and directions.
    "eps inside the root": Fault(
        "a small second moment gives another length",
        "lowrank_optim/functional/moments.py",
        "exp_avg_sq.sqrt().div_(correction2).add_(eps).mul_(correction1)",
        "exp_avg_sq.div(correction2**2).add_(eps).sqrt_().mul_(correction1)",
        (METHODS + "test_galore[auto-keep-(13, 7)]",),
    ),
    "another beta in a list": Fault(
        "small parameters that go together have their own lines",
        "lowrank_optim/functional/moments.py",
        "torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)",
        "torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta1)",
        (
            "tests/contract/test_backward.py::test_results_and_state_are_those_of_step[galore-torch.float32]",
        ),
    ),
    "no bias correction": Fault(
        "the first steps are too short",
        "lowrank_optim/functional/moments.py",
        "return 1 - beta1**count, math.sqrt(1 - beta2**count)",
        "return 1.0, 1.0",
        (METHODS + "test_galore[auto-keep-(13, 7)]",),
    ),
    "bias correction of the count before": Fault(
        "a count is read before it is taken",
        "lowrank_optim/engine/update.py",
        "    count(jobs)\n",
        "",
        (METHODS + "test_galore[auto-keep-(13, 7)]",),
    ),
    "age is not counted": Fault(
        "moments that were reset are corrected for the age of the run",
        "lowrank_optim/engine/carry.py",
        '    state["age"].zero_()\n',
        "",
        (METHODS + "test_galore[auto-reset-(13, 7)]",),
    ),
    "lion keeps what it shows": Fault(
        "the momentum decays by the first beta",
        "lowrank_optim/parts/rules/momentum.py",
        "moment.lerp_(grad, 1 - beta2)",
        "moment.lerp_(grad, 1 - beta1)",
        (METHODS + "test_other_rules[keep-rule0-lion-(13, 7)]",),
    ),
    "a number of the part, not of the group": Fault(
        "what stands in a group is ignored",
        "lowrank_optim/parts/rules/muon.py",
        'momentum: float = group["momentum"]',
        "momentum: float = self.momentum",
        (
            "tests/contract/test_numbers.py::test_a_change_acts_from_the_next_step_on[MuonW-momentum]",
        ),
    ),
    "another polynomial": Fault(
        "Newton and Schulz are led elsewhere",
        "lowrank_optim/functional/orthogonal.py",
        "QUINTIC = (3.4445, -4.7750, 2.0315)",
        "QUINTIC = (3.4445, -4.7550, 2.0315)",
        (WHOLE + "test_newton_schulz[5-(13, 7)]",),
    ),
    "second moment of an old basis": Fault(
        "a row that is rarely active jumps after a refresh",
        "lowrank_optim/functional/moments.py",
        "torch.maximum(exp_avg_sq, least, out=exp_avg_sq)",
        "torch.minimum(exp_avg_sq, least, out=exp_avg_sq)",
        (
            "tests/contract/test_extreme_gradients.py::"
            "test_a_second_moment_without_anything_is_made_up_from_the_first",
        ),
    ),
    # Subspaces and what is carried into them.
    "rotation transposed": Fault(
        "moments turn the wrong way",
        "lowrank_optim/functional/moments.py",
        "mean = mean @ rotation\n",
        "mean = mean @ rotation.mT\n",
        (METHODS + "test_galore[auto-rotate-(13, 7)]",),
    ),
    "variance by the rotation itself": Fault(
        "the second moment is carried like the first",
        "lowrank_optim/functional/moments.py",
        "(variance @ rotation.square())",
        "(variance @ rotation.abs())",
        (METHODS + "test_galore[auto-rotate-(13, 7)]",),
    ),
    "moments stay when the subspace moves": Fault(
        'on_refresh="rotate" does nothing',
        "lowrank_optim/engine/refresh.py",
        'plan.on_refresh == "rotate" and matrix.site.step > 0',
        "False",
        (METHODS + "test_galore[auto-rotate-(13, 7)]",),
    ),
    "no reset": Fault(
        'on_refresh="reset" does nothing',
        "lowrank_optim/engine/refresh.py",
        "            reset(job, plan, matrix.site)",
        "            pass",
        (METHODS + "test_galore[auto-reset-(13, 7)]",),
    ),
    "aligned to itself backwards": Fault(
        "a transpose is flipped in the Procrustes problem",
        "lowrank_optim/parts/projectors/_basis.py",
        "basis.copy_(work @ (left @ right))",
        "basis.copy_(work @ (left @ right).mT)",
        (METHODS + "test_galore[auto-align-(13, 7)]",),
    ),
    "refresh a step late": Fault(
        "a matrix counts its phase in the wrong direction",
        "lowrank_optim/engine/refresh.py",
        "(site.step - site.phase) % site.gap == 0",
        "(site.step + site.phase) % site.gap == 0",
        ("tests/contract/test_changed_groups.py::test_each_matrix_is_refreshed_in_its_phase",),
    ),
    "a zero gradient pins the subspace": Fault(
        "a layer that starts at zero keeps the unit vectors until the next refresh",
        "lowrank_optim/engine/refresh.py",
        'matrix.state["unset"] &= ~found[..., 0, 0]',
        'matrix.state["unset"].zero_()',
        (
            "tests/contract/test_robustness.py::"
            "test_a_first_gradient_of_zero_does_not_pin_the_subspace[keep-svd]",
        ),
    ),
    "the same draw at every refresh": Fault(
        "a random subspace never moves",
        "lowrank_optim/parts/projectors/random.py",
        'generator(torch.device("cpu"), site.seed, drawn)',
        'generator(torch.device("cpu"), site.seed)',
        ("tests/unit/test_projectors.py::test_draws_are_a_function_of_seed_and_step[Random()]",),
    ),
    "the least columns of the cosine basis": Fault(
        "scores are sorted the wrong way",
        "lowrank_optim/parts/projectors/dct.py",
        "scores.topk(matrices[0].site.rank, dim=-1)",
        "scores.topk(matrices[0].site.rank, dim=-1, largest=False)",
        (METHODS + "test_dct[l1-4-(13, 7)]",),
    ),
    "columns without order": Fault(
        "moments are carried as if indices were sorted",
        "lowrank_optim/parts/projectors/dct.py",
        ".indices.sort(dim=-1).values",
        ".indices",
        (METHODS + "test_dct[l1-1-(13, 7)]",),
    ),
    "blocks never come back": Fault(
        '"mirror" goes the same way in every round',
        "lowrank_optim/parts/projectors/blocks.py",
        'self.order == "mirror" and lap % 2',
        'self.order == "mirror" and lap % 3 == 2',
        (METHODS + "test_blocks_take_turns[mirror]",),
    ),
    "one rank too few": Fault(
        "the columns chosen hold less than the share",
        "lowrank_optim/engine/adaptive_rank.py",
        "(sums < share * total.unsqueeze(-1)).sum(-1) + 1",
        "(sums < share * total.unsqueeze(-1)).sum(-1).clamp_min(1)",
        ("tests/unit/test_auto_rank.py::test_a_known_spectrum_gets_the_rank_it_needs[0.95-3-svd]",),
    ),
    "min_dim is not read": Fault(
        "a share is taken of every short matrix",
        "lowrank_optim/parts/rank.py",
        "if share and not whole and min(matrix[-2:]) < min_dim:",
        "if share and not whole and min(matrix[-2:]) < 1:",
        ("tests/unit/test_groups.py::test_the_least_axis_is_128_by_default_and_one_takes_all",),
    ),
    # Residuals and the write.
    "limiter off": Fault(
        "a burst goes through",
        "lowrank_optim/parts/limiter.py",
        "factor = torch.where(norm > ceiling, ceiling / norm, 1.0)",
        "factor = torch.ones_like(norm)",
        (METHODS + "test_fira[False-1.01-code-(13, 7)]",),
    ),
    "limiter remembers the burst": Fault(
        "the norm before is the one that was not let through",
        "lowrank_optim/parts/limiter.py",
        "torch.where(used, torch.minimum(norm, ceiling), before)",
        "torch.where(used, norm, before)",
        (METHODS + "test_fira[False-1.01-code-(13, 7)]",),
    ),
    "Fira's norm as in the paper": Fault(
        "the authors' code drops k R P^T, not R P^T",
        "lowrank_optim/parts/residuals/norm_scaled.py",
        "value=kept**2 - 2 * kept",
        "value=-kept",
        (METHODS + "test_fira[False-1.01-code-(13, 7)]",),
    ),
    "row norm of the wrong matrix": Fault(
        "a row is scaled by its whole gradient",
        "lowrank_optim/parts/residuals/_norms.py",
        "norms.direction / (norms.low + TINY)",
        "norms.direction / (norms.grad + TINY)",
        (METHODS + "test_fira[False-1.5-paper-(13, 7)]",),
    ),
    "limiter after bias correction": Fault(
        "APOLLO-Mini's norm is measured before it",
        "lowrank_optim/parts/residuals/grad_scaled.py",
        "norm = factor * whole.grad * uncorrected",
        "norm = factor * whole.grad",
        (METHODS + "test_apollo[1-tensor-(13, 7)]",),
    ),
    "Alice's rest counts every column": Fault(
        "its length is that of cols, not cols - rank",
        "lowrank_optim/parts/residuals/compensated.py",
        "scale * math.sqrt(site.cols - site.rank)",
        "scale * math.sqrt(site.cols)",
        (METHODS + "test_compensated[keep-0.4-1.01-(13, 7)]",),
    ),
    "decay after the update": Fault(
        "the update decays too",
        "lowrank_optim/functional/write.py",
        "lift_(out, inner, factor, keep=decay, scale=stretch)",
        "lift_(out, inner, factor, scale=stretch)\n        out.mul_(decay)",
        (METHODS + "test_galore[auto-keep-(13, 7)]",),
    ),
    "maximize is ignored": Fault(
        "the weight goes down all the same",
        "lowrank_optim/parts/types.py",
        'lr if group["maximize"] else -lr',
        "-lr",
        (METHODS + "test_fira[True-1.01-code-(13, 7)]",),
    ),
    "sign of the whole gradient": Fault(
        "what the projection keeps is not taken out first",
        "lowrank_optim/functional/factors.py",
        "    lift_(grad, low, factor, scale=-1.0)\n    return grad",
        "    return grad",
        (METHODS + "test_frugal[svd-sign-(13, 7)]",),
    ),
    "error feedback not subtracted": Fault(
        "what was used is fed again",
        "lowrank_optim/engine/feed.py",
        "lift_(value, taken, factor, scale=-1.0)",
        "lift_(value, taken, factor, scale=0.0)",
        (FEEDS + "test_error_feedback[galore-0.0-(13, 7)]",),
    ),
    "LDAdam learns from the gradient": Fault(
        "the momentum has no part in the subspace",
        "lowrank_optim/parts/feeds/general_error_feedback.py",
        "lesson.add_(fed, alpha=1 - rho)",
        "lesson.mul_(0).add_(fed, alpha=1 - rho)",
        (FEEDS + "test_ldadam[0.5-(13, 7)]",),
    ),
    # Formats and random bits.
    "a scale per block shifted": Fault(
        "a block is decoded with the scale of the next",
        "lowrank_optim/functional/blockwise.py",
        "scale.repeat_interleave(BLOCK, dim=-1)",
        "scale.roll(1, -1).repeat_interleave(BLOCK, dim=-1)",
        ("tests/kernels/test_blockwise.py::test_squares_are_rounded_to_a_neighbour",),
    ),
    "squares in the map of values": Fault(
        "second moments lose half their range",
        "lowrank_optim/functional/blockwise.py",
        "dynamic_map(False, device).square()",
        "dynamic_map(False, device)",
        (FORMATS + "test_quantize_squares[cpu-shape1]",),
    ),
    "squares rounded to nearest": Fault(
        "an average that changes by less than half a gap never falls",
        "lowrank_optim/functional/blockwise.py",
        "(noise.to(torch.float32) + 0.5 < _rows(place, x, torch.float32))",
        "(noise.to(torch.float32) * 0 + 32767.5 < _rows(place, x, torch.float32))",
        ("tests/kernels/test_blockwise.py::test_stochastic_rounding_is_unbiased",),
    ),
    "stochastic rounding is biased": Fault(
        "half of the bits round up too seldom",
        "lowrank_optim/functional/rounding.py",
        "(x.view(torch.int32) + bits)",
        "(x.view(torch.int32) + (bits >> 1))",
        (
            "tests/unit/test_functional.py::"
            "test_stochastic_rounding_is_unbiased_and_between_neighbours",
        ),
    ),
    "all parameters share their bits": Fault(
        "the position is lost",
        "lowrank_optim/functional/rounding.py",
        "torch.full((), noise.stream >> 32,",
        "torch.full((), 0,",
        (
            "tests/unit/test_functional.py::"
            "test_random_bits_are_a_function_of_place_and_never_shared",
        ),
    ),
    "halves of a byte exchanged": Fault(
        "values in four bits change places",
        "lowrank_optim/functional/fourbit.py",
        "torch.stack([low, packed >> 4], -1)",
        "torch.stack([packed >> 4, low], -1)",
        (FOURBIT + "test_keeps_places",),
    ),
    # Kernels.
    "the scale sees what is beyond the row": Fault(
        "the mask of a partial block is dropped",
        "kernels/moments.py",
        "peaks(tl.where(inside, tl.abs(m), 0.0)),",
        "peaks(tl.abs(m)),",
        (KERNELS + "test_moments_that_fade_have_the_scale_of_what_is_there[cpu]",),
    ),
    "norms see what is beyond the row": Fault(
        "codes beyond a row decode to something",
        "kernels/project.py",
        "            direction = tl.where(inside, direction, 0.0)\n",
        "",
        (KERNELS + "test_project_moments[cpu-two blocks-8bit-bfloat16-transposed-basis]",),
    ),
    "the kernel decays the update": Fault(
        "decay after the update",
        "kernels/lift.py",
        "w = decay * w + step_size * update",
        "w = decay * (w + step_size * update)",
        (KERNELS + "test_lift_write[cpu-drop-float32-straight-basis-tall]",),
    ),
    "the kernel's sign of chosen columns": Fault(
        "columns that are projected move by their sign too",
        "kernels/lift.py",
        "dropped = tl.where(place[None, :] >= 0, 0.0, g)",
        "dropped = g",
        (KERNELS + "test_lift_write[cpu-sign-bfloat16-strided-columns-tall]",),
    ),
    "the kernel's halves exchanged": Fault(
        "random bits come in another order than in plain torch",
        "kernels/_device.py",
        "tl.join(words & 0xFFFF, words >> 16)",
        "tl.join(words >> 16, words & 0xFFFF)",
        (FORMATS + "test_random_bits[cpu-False-rows0-21-0]",),
    ),
    "the kernel moves columns of one block": Fault(
        "a column takes the scale of the block it goes to",
        "kernels/columns.py",
        "row[:, None] * blocks + place // BLOCK",
        "row[:, None] * blocks + lane[None, :] // BLOCK",
        (FORMATS + "test_move_columns[cpu-1-False-signed-shape1]",),
    ),
    "the kernel's score without a root": Fault(
        "l2 is the sum of squares",
        "kernels/dct.py",
        'return sums.sqrt() if norm == "l2" else sums',
        "return sums",
        ("tests/kernels/test_dct_kernel.py::test_many_gradients_in_one_call[cpu-l2]",),
    ),
    "the kernel has one length for all": Fault(
        "matrices of a launch move as far as the first of them",
        "kernels/lift.py",
        "tl.load(lengths + k)",
        "tl.load(lengths)",
        (LENGTHS + "test_lift_write_stretches_each_matrix[cpu-drop-basis-float32-straight-False]",),
    ),
    "the kernel's sample in other columns": Fault(
        "entries of a row lie side by side",
        "kernels/length.py",
        "tl.load(starts + k) + entry * stride",
        "tl.load(starts + k) + entry",
        (LENGTHS + "test_sample_moments[cpu-few-straight-bfloat16-False]",),
    ),
    "the kernel's sample of one row": Fault(
        "entries that are not there have a direction where eps is 0",
        "kernels/length.py",
        "tl.where(finite, direction * direction, 0.0)",
        "direction * direction",
        (LENGTHS + "test_what_is_beyond_a_sample_is_no_part_of_the_sum[cpu]",),
    ),
    "the kernel's norm of a sign sees chosen columns": Fault(
        "the sign of what is projected counts too",
        "kernels/length.py",
        "dropped = tl.where(chosen, 0.0, g)",
        "dropped = g",
        (LENGTHS + "test_sign_squares[cpu-tall-columns-float16-strided-both]",),
    ),
    "the kernel's norm without the factor of a direction": Fault(
        "what is measured is not what is written",
        "kernels/length.py",
        "        lifted *= a\n",
        "",
        (LENGTHS + "test_sign_squares[cpu-tall-basis-float32-straight-both]",),
    ),
    "samples of two widths in a launch": Fault(
        "shards of one shape, of matrices of unlike height, have entries of one width",
        "lowrank_optim/engine/length.py",
        """grad.stride(), job.state[f"{SAMPLE}.exp_avg"].shape)""",
        "grad.stride())",
        (LENGTHS + "test_samples_of_other_widths_have_launches_of_their_own[cpu]",),
    ),
    "every shard's sample begins at the first row": Fault(
        "its entries lie in other columns than on one process",
        "lowrank_optim/parts/length.py",
        "return start + first_row * width_of(site)",
        "return start",
        (
            "tests/sharded/test_length_shards.py::"
            "test_a_sample_lies_where_it_does_on_one_process[fsdp-2]",
        ),
    ),
    "a sample moves with the place of its parameter": Fault(
        "its moments become those of other entries where groups change",
        "lowrank_optim/engine/length.py",
        "[first_entry(site_of(job)) for job in some]",
        "[first_entry(site_of(job)) + job.position for job in some]",
        (
            "tests/contract/test_length_states.py::"
            "test_a_sample_has_the_same_entries_wherever_its_parameter_stands",
        ),
    ),
    "an appended group has the scale of the constructor's length": Fault(
        "only a scale that is None is replaced",
        "lowrank_optim/settings/numbers.py",
        """group.get("length", defaults["length"]) != defaults["length"]""",
        "False",
        ("tests/contract/test_length.py::test_the_scale_of_a_group_without_one_is_the_methods",),
    ),
    "a sample is kept whole": Fault(
        "its moments are not cut as rows are",
        "lowrank_optim/parts/plan.py",
        "*self.kept_by_row, SAMPLE)",
        "*self.kept_by_row)",
        (
            "tests/sharded/test_length_shards.py::"
            "test_a_sample_lies_where_it_does_on_one_process[fsdp-2]",
        ),
    ),
    "an entry spoils its matrix": Fault(
        "one value that is not finite decides on the length of all",
        "lowrank_optim/functional/length.py",
        "direction.nan_to_num_(0.0, 0.0, 0.0)",
        "direction",
        (LENGTHS + "test_an_entry_that_is_not_finite_counts_as_nothing[cpu-nan]",),
    ),
    "a sample is not looked at": Fault(
        "a checkpoint with negative squares is taken",
        "lowrank_optim/checkpoints/states.py",
        "if part and key not in saved.plan.length.keys:",
        "if part:",
        (KEPT + "test_a_damaged_sample_is_refused_by_name",),
    ),
    "a sample of projected gradients": Fault(
        "AdamW's length is measured on what is left of a sum",
        "lowrank_optim/layerwise/hooks.py",
        """if group["rank"] is not None and plan.length.sampled:""",
        "if False:",
        (KEPT + "test_projected_accumulation_has_no_entries_for_a_sample",),
    ),
    "another length's scale": Fault(
        "a scale of published updates is read as one of AdamW's length",
        "lowrank_optim/checkpoints/imports.py",
        """if "scale" in taken and plan.length.measured:""",
        "if False:",
        (
            "tests/frameworks/test_import_refused.py::"
            "test_what_cannot_be_imported_is_refused_and_changes_nothing[a length of its own]",
        ),
    ),
    "a length reads the gradient again": Fault(
        "norms of gradients are made where nothing asks for them",
        "lowrank_optim/engine/launches.py",
        "norms=want.norms or norms_of_rest",
        "norms=want.norms or length.measured",
        (LENGTHS + "test_matrices_share_the_launches_of_a_length[cpu]",),
    ),
    "a length of gradients that are written to": Fault(
        "the norm of an update with a sign and a rest scales the gradient on its way",
        "lowrank_optim/functional/length.py",
        "y = part * phi  #",
        "y = part.mul_(phi)  #",
        ("tests/unit/test_length_functions.py::test_squares_are_those_of_the_matrix",),
    ),
    # Steps inside the backward pass.
    "hooks stay": Fault(
        "an optimizer that was told to stop goes on",
        "lowrank_optim/layerwise/hooks.py",
        "            handle.remove()\n        self._handles.clear()",
        "            pass\n        self._handles.clear()",
        (
            "tests/contract/test_backward_edges.py::"
            "test_without_its_optimizer_or_handle_a_hook_does_nothing[True]",
        ),
    ),
    "the last pass is lost": Fault(
        "a gradient that completes a sum is not added to it",
        "lowrank_optim/layerwise/hooks.py",
        "        if param in self._sums:\n            self._collect(step, entry)\n",
        "",
        (
            "tests/contract/test_backward_accumulation.py::"
            "test_projected_gradients_accumulate_to_rounding[dtype1-LowRank-settings0]",
        ),
    ),
    "clipped by the norm before alone": Fault(
        "a gradient larger than all before goes through",
        "lowrank_optim/layerwise/hooks.py",
        "total = torch.maximum(before.to(total).nan_to_num(posinf=0.0), total)",
        "total = before.to(total).nan_to_num(posinf=0.0)",
        ("tests/contract/test_backward_norms.py::test_clipping_by_the_step_before",),
    ),
    "skipped steps are not counted": Fault(
        "nobody learns that a batch was left out",
        "lowrank_optim/engine/step.py",
        'group["skipped_steps"] += group["skip_nonfinite"]',
        'group["skipped_steps"] += 0',
        (
            "tests/contract/test_bad_input.py::"
            "test_skip_nonfinite_leaves_everything_and_counts[galore]",
        ),
    ),
    "a bool over an equal number": Fault(
        "a checkpoint holds what no optimizer takes",
        "lowrank_optim/engine/session.py",
        "kinds.append(kind := type(value))",
        "kind = type(value)",
        (
            "tests/unit/test_session.py::"
            "test_a_bool_is_no_number_and_a_number_no_bool_though_they_are_equal",
        ),
    ),
    "a generator used up": Fault(
        "a group has no parameters after zero_grad",
        "lowrank_optim/optimizer.py",
        "self._session.note_members()  # else torch would use up a generator among the groups",
        "pass",
        ("tests/contract/test_changed_groups.py::test_groups_in_odd_forms_between_steps",),
    ),
    "a number that decides on a key": Fault(
        "nobody learns which number was changed to None",
        "lowrank_optim/engine/state.py",
        "if (key in template(param, site, group, changed)) != (key in wanted):",
        "if False:",
        (
            "tests/contract/test_numbers.py::"
            "test_a_number_that_is_none_or_not_decides_what_is_kept_and_is_named",
        ),
    ),
    # Checkpoints.
    "names paired by place": Fault(
        "states go to other parameters of the same shape",
        "lowrank_optim/checkpoints/pairing.py",
        'own = [ids.get(name, ("frozen", name)) for name in names]',
        'own = list(saved[place]["params"])[: len(names)]',
        (
            "tests/contract/test_checkpoint_names.py::"
            "test_states_go_to_the_parameters_of_their_names[dct-reversed]",
        ),
    ),
    "the dtype of the file": Fault(
        "halves that a trainer made stay halves",
        "lowrank_optim/checkpoints/states.py",
        "value = state[key].detach().to(wanted[key].dtype)",
        "value = state[key].detach()",
        (
            "tests/contract/test_checkpoint_storage.py::"
            "test_halves_that_a_trainer_made_are_cast_up[galore-half0]",
        ),
    ),
    "squares decoded as values": Fault(
        "a second moment is read from the wrong map",
        "lowrank_optim/checkpoints/states.py",
        "load((here(codes), here(scale)), torch.float32, square)",
        "load((here(codes), here(scale)), torch.float32, False)",
        (
            "tests/contract/test_checkpoint_storage.py::test_moments_and_bases_are_converted[galore-8bit-None]",
        ),
    ),
    "numbers of the first layout are forgotten": Fault(
        "a checkpoint of version 1 goes on with the numbers of here",
        "lowrank_optim/checkpoints/versions.py",
        "                found.update(said_by(text, part))\n",
        "",
        ("tests/contract/test_numbers.py::test_a_checkpoint_of_the_first_layout_goes_on[muon]",),
    ),
    "a key is not saved": Fault(
        "a flat checkpoint lacks the last entry of each state",
        "lowrank_optim/checkpoints/flatten.py",
        '[[text_of(k, name), text_of(v, f"{name}.{k}")] for k, v in value.items()]',
        '[[text_of(k, name), text_of(v, f"{name}.{k}")] for k, v in [*value.items()][:-1]]',
        ("tests/contract/test_flat.py::test_any_optimizer_can_be_written",),
    ),
    "the seed of here": Fault(
        "a resumed run draws other numbers",
        "lowrank_optim/checkpoints/load.py",
        '"shard_basis")\n',
        '"shard_basis", "seed")\n',
        (
            "tests/contract/test_rounding.py::"
            "test_a_resumed_run_goes_on_with_the_draws_of_its_seed[galore-step]",
        ),
    ),
    # Several processes.
    "a shard's first row is lost": Fault(
        "every shard draws the bits of the first rows",
        "lowrank_optim/sharding/layout.py",
        "return self.spans[self.axis][0] + int(stacked)",
        "return int(stacked)",
        (SHARDED + "test_random_bits_go_by_the_row_of_the_whole_matrix[bfloat16-fsdp-2]",),
    ),
    "rows of a stack are those held": Fault(
        "shards of a stack share random bits",
        "lowrank_optim/functional/rounding.py",
        "height = length if noise.height is None else noise.height",
        "height = length",
        (SHARDED + "test_random_bits_go_by_the_row_of_the_whole_matrix[bfloat16-columns]",),
    ),
    "scores of the rows that are here": Fault(
        "processes choose different columns",
        "lowrank_optim/parts/projectors/dct.py",
        "        return site.team.sum_(scores)",
        "        return scores",
        (SHARDED + "test_every_layout_gives_the_numbers_of_one_process[fsdp-2]",),
    ),
    "a norm of the rows that are here": Fault(
        "the limiter sees a part of the matrix",
        "lowrank_optim/engine/two_phase.py",
        "total = team.sum_(torch.stack([parts[number][row] for _, _, number, row in order]))",
        "total = torch.stack([parts[number][row] for _, _, number, row in order])",
        (SHARDED + "test_every_layout_gives_the_numbers_of_one_process[fsdp-2]",),
    ),
    "summed, not averaged": Fault(
        "gradients of DistributedDataParallel are those of all processes",
        "lowrank_optim/layerwise/ddp.py",
        "x.div_(dist.get_world_size(group))",
        "x.div_(1)",
        ("tests/sharded/test_ddp.py::test_projected_gradients_are_enough[galore]",),
    ),
    # What stands around a step.
    "the head is projected": Fault(
        "the last matrix of what is called a head counts as any other",
        "lowrank_optim/roles.py",
        "                last[branch(path, depth, modules)] = param",
        "                pass",
        (
            "tests/unit/test_roles.py::"
            "test_the_last_matrix_of_what_is_called_a_head_is_one_and_no_other",
        ),
    ),
    "what a model declares is not asked": Fault(
        "an output layer of another name is projected",
        "lowrank_optim/roles.py",
        '("get_input_embeddings", "get_output_embeddings")',
        '("get_input_embeddings",)',
        ("tests/unit/test_roles.py::test_what_a_model_declares_is_its_head_whatever_its_name",),
    ),
    "the planner forgets a moment": Fault(
        "a plan is too small by the scales of 8-bit AdamW",
        "lowrank_optim/planner/needs.py",
        "2 * (size + 4 * -(-size // 256))",
        "2 * size + 4 * -(-size // 256)",
        (
            "tests/unit/test_planner_state.py::test_state_of_others_is_that_after_a_step[Odd-torch.float32]",
        ),
    ),
    "a frozen state is predicted": Fault(
        "bytes of the step count are left out",
        "lowrank_optim/engine/memory.py",
        'row["state"] += tensor_bytes(template(param, site, group, plan, layout))',
        'row["state"] += tensor_bytes(template(param, None, group, plan, layout))',
        ("tests/contract/test_memory.py::test_prediction_equals_measurement[galore]",),
    ),
    "a scale inside a length": Fault(
        "a scale acts on a part of the update before it is brought to its length",
        "lowrank_optim/parts/length.py",
        'return {**group, "scale": 1.0}',
        "return group",
        ("tests/contract/test_length.py::test_a_length_changes_no_direction",),
    ),
    "a length without the rest": Fault(
        "the norm of an update is the one of what lies in the subspace",
        "lowrank_optim/engine/length.py",
        "total = total + t * (2 * squares[..., 1] + t * squares[..., 2])",
        "total = total + 0 * t",
        ("tests/contract/test_length.py::test_a_fixed_length_is_two_tenths_in_every_step[fira]",),
    ),
    "Muon's rate at AdamW's length": Fault(
        "without an lr matrices move twenty times as far as AdamW",
        "lowrank_optim/optimizer.py",
        'return cls.published_lr if length == "published" else 1e-3',
        "return cls.published_lr",
        (
            "tests/contract/test_length.py::"
            "test_a_length_that_is_not_published_has_the_rate_of_adamw[MuonW]",
        ),
    ),
}
