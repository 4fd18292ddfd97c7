"""The bug museum: real bugs, other systems' and this one's own, put back one at a time; a test of ours must go red.

Each exhibit names the bug, a patch that brings it back, and the check (file.test of this folder, with the arguments of
one of its cases), which passes without the patch. "ours" stood in this code once, "possible" are nobody's that we know
of. A patch that rewrites a line asserts that the line is there once, so that it cannot rot unseen: if the code has
moved on, move the patch.
"""

# ruff: noqa: F401 (checks and their fixtures are taken by name)

import inspect
import textwrap
from typing import NamedTuple

import pytest
import test_data
import test_exact
import test_faults
import test_group_rows
import test_losses
import test_resume
import test_rewards
import test_runs
import test_sampler
import torch
from test_data import root
from test_faults import pytestmark, runner
from test_runs import launch, task

import data
import losses
import model
import rollout
import train_dpo
import train_grpo
from rewards import answers, form

RED = (AssertionError, pytest.fail.Exception)  # the second is `pytest.raises` that saw nothing raised


def rewrite(owner, name, *changes):
    """A patch: owner.name with (old, new) strings replaced in its source."""
    def patch(monkeypatch, _):
        function, scope = inspect.unwrap(getattr(owner, name)), {}
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert source.count(old) == 1, f"{name} has {source.count(old)} times: {old}"
            source = source.replace(old, new)
        exec(compile(source, f"<{name}, as it must not be>", "exec"), function.__globals__, scope)
        monkeypatch.setattr(owner, name, scope[name])

    return patch


def around(owner, name, wrapper):
    """A patch: wrapper(the original, *its arguments, **its keywords) in the place of owner.name."""
    def patch(monkeypatch, _):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))

    return patch


# --- bugs that a wrapper brings back


def shifted_markers(original, policy, tokens, text_inputs, pixels):
    """The image markers of the prompt, one place off."""
    types = {key: value.roll(1, -1) for key, value in text_inputs.items()}
    return original(policy, tokens, types, pixels)


def keep_end(original, policy, processor, row):
    """Truncation from the left, through the image: its tokens are gone, the rest trains on."""
    prompt = original(policy, processor, row)
    kept = prompt.tokens != policy.hf.config.image_token_id
    return prompt._replace(tokens=prompt.tokens[kept], pixels={}, positions=torch.arange(int(kept.sum())).expand(3, -1))


def pops_images(original, policy, processor, row):
    prompt = original(policy, processor, row)
    row["images"] = []
    return prompt


def no_temperature(original, policy, batch, temperature=1.0, *args, **kwargs):
    return original(policy, batch, 1.0, *args, **kwargs)


def renormalised(original, *args, **kwargs):
    """Of one token that is left, the narrowed distribution gives a log-prob of 0."""
    sampled = original(*args, **kwargs)
    logps = torch.zeros_like(sampled.sampling_logps) if kwargs.get("top_k") == 1 else sampled.sampling_logps
    return sampled._replace(sampling_logps=logps)


def mask_of_pads(original, policy, *args, **kwargs):
    sampled = original(policy, *args, **kwargs)
    return sampled._replace(completion_mask=sampled.completion_ids != policy.pad_id)


def encoded_again(monkeypatch, get):
    """Completions are decoded, and what is trained are the ids of the text."""
    sample, processor = rollout.sample, get("loaded")("qwen2_5_vl")[1]

    def patched(policy, *args, **kwargs):
        sampled = sample(policy, *args, **kwargs)
        answers = [ids[mask] for ids, mask in zip(sampled.completion_ids, sampled.completion_mask)]
        texts = [processor.tokenizer.decode(ids) for ids in answers]
        ids = [torch.tensor(processor.tokenizer(text)["input_ids"] or [policy.pad_id]) for text in texts]
        longest = max(map(len, ids))
        mask = torch.arange(longest) < torch.tensor([len(x) for x in ids])[:, None]
        padded = torch.stack([torch.nn.functional.pad(x, (0, longest - len(x)), value=policy.pad_id) for x in ids])
        logps = torch.nn.functional.pad(sampled.sampling_logps, (0, max(0, longest - sampled.sampling_logps.shape[1])))
        return sampled._replace(completion_ids=padded, completion_mask=mask, sampling_logps=logps[:, :longest] * mask)

    monkeypatch.setattr(rollout, "sample", patched)


def divided_again(original, logps, *args, **kwargs):
    """By the number of micro-batches of the 12 completions, which the count knows already."""
    loss, metrics = original(logps, *args, **kwargs)
    return loss / (12 // len(logps)), metrics


def mean_of_the_micro_batch(original, logps, old_logps, A, mask, **kwargs):
    loss, metrics = original(logps, old_logps, A, mask, **kwargs)
    return loss / mask.sum(), metrics


def without_processor(original, policy, processor, source, folder, rank=0):
    original(policy, processor, source, folder, rank)
    for name in ("processor_config.json", "preprocessor_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)


def worst_of_both(monkeypatch, get):
    """PPO's bound taken as a maximum where A < 0, which cuts what it should keep and keeps what it should cut."""
    rewrite(losses, "clipped_term", "-torch.min(capped * A, ratio.clamp(1 - epsilon, 1 + epsilon_high) * A)",
            "-torch.where(A > 0, torch.min(capped * A, ratio.clamp(1 - epsilon, 1 + epsilon_high) * A), "
            "torch.max(capped * A, ratio.clamp(1 - epsilon, 1 + epsilon_high) * A))")(monkeypatch, get)
    monkeypatch.setitem(losses.POLICY_LOSSES, "grpo", (losses.clipped_term, "sequence"))


def unclamped(monkeypatch, get):
    rewrite(losses, "discopop_loss", "(-m).clamp(max=80).exp()", "(-m).exp()")(monkeypatch, get)
    monkeypatch.setitem(losses.PAIR_LOSSES, "discopop", losses.discopop_loss)


# --- checks that no other file has


def every_rank_runs_the_vision_tower(loaded):
    """Under FSDP a rank whose micro-batch has no image must enter the tower all the same: the others wait there."""
    policy, processor = loaded("qwen2_5_vl")
    calls = []
    hook = policy.hf.get_encoder(modality="image").register_forward_hook(lambda *_: calls.append(1))
    policy.filler = data.encode_prompt(policy, processor, data.shapes_rows(1, 0, "train")[0])
    try:
        group = test_group_rows.make_group(policy, processor, 0, [3, 2])
        logps = policy(policy.pack([group]))[0]
        policy.filler = None
        torch.testing.assert_close(logps, policy(policy.pack([group]))[0])
    finally:
        policy.filler = None
        hook.remove()
    assert len(calls) == 1


def a_typo_in_resume_is_an_error(tmp_path):
    """--resume names a checkpoint that is not there: no run starts from the beginning instead."""
    args = train_dpo.parse_args(["--resume", "nowhere", "--output_dir", str(tmp_path / "r")])
    with pytest.raises(model.InputError, match="--resume nowhere"):
        model.open_run(args, 0, 1)


def checkpoints_without_a_manifest_are_no_fresh_start(tmp_path):
    assert test_faults.save(tmp_path, 1, *test_faults.parts())
    (tmp_path / "checkpoints" / "step_1" / "manifest.json").unlink()
    with pytest.raises(model.InputError, match="none of the checkpoints"):
        model.load_checkpoint(tmp_path, *test_faults.parts(), 0)


def what_was_resumed_from_is_not_written_again(tmp_path):
    """With --save_total_limit 1 it is the only checkpoint there is."""
    policy, optimizer = test_faults.parts()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert test_faults.save(tmp_path, 3, policy, optimizer)
    before = (tmp_path / "checkpoints" / "step_3").stat().st_ino
    model.Saver(1, tmp_path, policy, optimizer, scheduler, 0, saved=3).save({"step": 3}, {}, last=True)
    assert (tmp_path / "checkpoints" / "step_3").stat().st_ino == before


# --- the exhibits


class Exhibit(NamedTuple):
    bug: str      # whose, and what
    patch: object  # (monkeypatch, request.getfixturevalue) -> None
    check: str    # file.test, or a function above
    case: dict = {}  # arguments that are no fixtures
    red: tuple = ()  # how else it may fail: an exception that the bug itself raises
    slow: bool = False


QWEN = {"family": "qwen2_5_vl"}
PACKED = "test_group_rows.test_packed_equals_transformers_one_by_one"
SAMPLER = "test_sampler.test_sampler_equals_trainer"
BAD_IMAGE = "test_data.test_bad_images_name_row_and_file"
CUTS = "test_runs.test_grpo_gradients_do_not_depend_on_micro_batches"

EXHIBITS = [
    # images and prompts
    Exhibit("TRL #5785: image markers padded on the other side than the prompt", around(
        model.Policy, "prompt_positions", shifted_markers), PACKED,
        QWEN | {"batch": test_group_rows.BATCHES["one image"], "one_row": False}),
    Exhibit("TRL #5283: truncation drops the image tokens, the loss still falls", around(
        data, "encode_prompt", keep_end), "test_group_rows.test_pixels_matter"),
    Exhibit("verl #4999: the length filter popped the images first", around(
        data, "encode_prompt", pops_images), "test_data.test_prompt_is_what_the_processor_makes", QWEN),
    Exhibit("miles #2406, torchtitan #4777: a rank without images does not enter the vision tower", rewrite(
        model.Policy, "pack", "if self.filler is not None and", "if False and"), "every_rank_runs_the_vision_tower"),
    Exhibit("possible: pictures in another order than their groups", rewrite(
        model, "pack_groups", "cat_pixels([prompt for prompt, _ in groups])",
        "cat_pixels([prompt for prompt, _ in groups[::-1]])"), PACKED,
        QWEN | {"batch": test_group_rows.BATCHES["mixed, uneven, padded"], "one_row": True}),
    Exhibit("possible: a completion attends to the prompt before its own", rewrite(
        model, "attend_segments", "at += 1 + len(completions)", "at += len(completions)"),
        "test_group_rows.test_segments_are_the_dense_mask",
        {"batch": test_group_rows.BATCHES["mixed, uneven, padded"]}, red=(RuntimeError,)),
    Exhibit("ours: a padding token that attends to nothing", rewrite(
        model, "group_attention_mask", "(ordered & same_group & visible)",
        "(ordered & same_group & visible & (group_ids >= 0)[:, :, None])"), "test_group_rows.test_attention_mask_rule"),
    Exhibit("ours: a 16-bit picture is white", rewrite(
        data, "decode_image", 'if shown.mode == "I;16":', "if False:"), "test_faults.test_images_are_rgb_as_shown"),
    Exhibit("ours: black on transparent is black on black", rewrite(
        data, "decode_image", "if shown.has_transparency_data:", "if False:"),
        "test_faults.test_images_are_rgb_as_shown"),
    Exhibit("Pillow only warns of 144 megapixels, and decodes them", rewrite(
        data, "decode_image", "if opened.width * opened.height > MAX_IMAGE_PIXELS:", "if False:"),
        "test_faults.test_decompression_bombs_are_not_decoded", {"size": (12_000, 12_000)}, red=(TypeError,)),
    Exhibit("torchtitan #4293: an image URL of a row is fetched", rewrite(
        data, "load_image", 'if "://" in image or image.startswith("data:"):', "if False:"), BAD_IMAGE,
        {"image": "https://example.com/a.png", "message": "URLs are not fetched"}),
    Exhibit("FastChat #3873, LLaMA-Factory #8556: ../../etc/passwd is an image", rewrite(
        data, "load_image", "if os.path.commonpath([root, path]) != root:", "if False:"), BAD_IMAGE,
        {"image": "../outside.png", "message": "outside --image_root"}),
    Exhibit("ours: a row's own _image_root won over the flag", rewrite(
        data, "canonical", 'value | {"_source": source, "_image_root": image_root}',
        '{"_source": source, "_image_root": image_root} | value'), "test_data.test_a_row_cannot_move_its_root"),
    Exhibit("ours: an answer was cut at an EOS inside it", rewrite(
        data, "encode_completion", '["input_ids"]) & set(policy.eos_ids):', '["input_ids"]) & set():'),
        "test_data.test_bad_pairs_are_refused",
        {"column": "chosen", "value": "4<|im_end|>lost", "message": "end-of-turn token"}),
    Exhibit("transformers runs on with a model that brings its own code", around(
        model, "refuse_remote_code", lambda *_: None), "test_faults.test_models_that_are_not_loaded"),
    # sampling
    Exhibit("R1-V #91, verl #3469: the policy samples <|image_pad|>", around(
        model, "scaled_logits", lambda _, logits, never, temperature: logits.float() / temperature),
        "test_sampler.test_placeholders_are_never_sampled", QWEN),
    Exhibit("TRL #4159: no temperature in the trainer's log-probs", around(
        model.Policy, "forward", no_temperature), SAMPLER, QWEN | {"temperature": 1.5}),
    Exhibit("TRL #6789: top-p renormalised in the sampler alone", around(
        rollout, "sample", renormalised), "test_sampler.test_narrowing_changes_the_draw_and_not_the_log_probs"),
    Exhibit("cs336 #15, rllm #816: decoded, and encoded again", encoded_again, SAMPLER, QWEN | {"temperature": 1.0}),
    Exhibit("tiny-grpo: the mask is ids != pad, and pad is EOS", around(
        rollout, "sample", mask_of_pads), "test_sampler.test_eos_ends_and_belongs_to_the_completion"),
    Exhibit("ours: searchsorted without right=True draws an id of probability 0", rewrite(
        rollout, "sample_tokens", "searchsorted(within, target, right=True)", "searchsorted(within, target)"),
        "test_sampler.test_uniform_ends"),
    Exhibit("possible: a completion that takes the place of one that has ended leaves its keys behind", rewrite(
        rollout.GroupCache, "move", "buffer[targets, :, :width] = buffer[sources, :, :width]", "pass"), SAMPLER,
        QWEN | {"temperature": 1.0}),
    Exhibit("possible: an inverse CDF that loses the rounding between a block's sum and its parts", rewrite(
        rollout, "sample_tokens", "target = target - (cdf - sums).gather(-1, chosen)", "pass"),
        "test_sampler.test_blocks_are_one_cdf", {"vocabulary": 1024}),
    Exhibit("possible: a hash that forgets k gives a group of one answer", rewrite(
        rollout, "keyed_uniform", "for word in (draw, k, t):", "for word in (draw, 0 * k, t):"),
        "test_sampler.test_randomness_belongs_to_the_draw"),
    # sums, counts, ranks
    Exhibit("TRL #3021, transformers #34191: a mean of the micro-batch", rewrite(
        losses, "token_mean", "return (x.sum(-1) / mask.sum(-1).clamp(min=1)).sum()",
        "return (x.sum(-1) / mask.sum(-1).clamp(min=1)).mean()"), "test_losses.test_sum_over_count_is_split_invariant",
        {"parts": 1}),
    Exhibit("open-instruct #1161: token means per micro-batch", around(
        losses, "policy_loss", mean_of_the_micro_batch), CUTS, {"loss_type": "dapo"}, slow=True),
    Exhibit("ms-swift #10117: divided by the accumulation again", around(
        losses, "policy_loss", divided_again), CUTS, {"loss_type": "grpo"}, slow=True),
    Exhibit("NeMo Automodel #3830: world_size times a local mean", around(
        model, "all_reduce_sums", lambda _, sums, device="cpu": sums),
        "test_faults.test_counts_are_those_of_all_ranks"),
    Exhibit("pytorch #77562: a decision, here to skip a step, from one rank's numbers", rewrite(
        model, "clip_grad_norm_", "float(full(nn.utils.clip_grad_norm_(parameters, max_norm)))",
        "float(sum(p.grad.to_local().norm() for p in parameters))"),
        "test_faults.test_nan_on_one_rank_is_seen_by_all"),
    # advantages and rewards
    Exhibit("Search-R1 #88: a group is not the completions of one prompt", rewrite(
        losses, "centred", ".double().view(-1, num_generations)", ".double().view(num_generations, -1).T"),
        "test_losses.test_group_advantages_by_hand"),
    Exhibit("DeepAnalyze #116: the std of a group of one", rewrite(
        losses, "centred", "if num_generations < 2:", "if False:"), "test_losses.test_group_of_one_is_refused"),
    Exhibit("ms-swift #8123: None makes the advantages nan", rewrite(
        losses, "weighted_rewards", "scores.nan_to_num(0.0)", "scores"),
        "test_losses.test_weighted_rewards_skip_who_abstained"),
    Exhibit("TRL: the rounding of a mean, over 1e-4, is an advantage", rewrite(
        losses, "centred", "flat = highest - lowest <= 1e-8 * size", "flat = highest < lowest"),
        "test_losses.test_equal_rewards_give_exactly_zero"),
    Exhibit("TRL #6533: one reward is broadcast to all", rewrite(
        rollout, "checked_rewards", "if len(result) != count:", "result = result * count\n    if len(result) < count:"),
        "test_faults.test_what_a_reward_may_return", {"what": "[1.0]", "expected": "expected 3 rewards"}),
    Exhibit("verl #6673, UniRL #462: one completion that the grader dies of ends the run", rewrite(
        rollout.RewardRunner, "_score_one", "if self.process.returncode == -signal.SIGTERM:", "if True:"),
        "test_faults.test_rewards_that_crash", red=(rollout.RewardError,)),
    Exhibit("open-r1 #237, R1-V #19: a format pattern without DOTALL", rewrite(
        form, "think_format", "FORMAT.fullmatch(text)", "re.fullmatch(FORMAT.pattern, text)"), "test_rewards.test_format",
        {"text": "<think>a\nb</think>\n<answer>4</answer>", "expected": 1}),
    Exhibit("ours: 'A picture' is choice A", rewrite(
        answers, "read_choice", "re.match(FIRST_CHOICE,", r"re.match(FIRST_CHOICE.replace(r'(?:\)|[.:](?!\w)|\.?$)', r'\b'),"),
        "test_rewards.test_accuracy",
        {"text": "A picture of two dogs.", "solution": "A", "expected": 0}),
    # losses
    Exhibit("NeMo-RL #2506, TRL #4638: the KL's gradient lacks the sampling term", rewrite(
        losses, "policy_loss", "kl * ratio if use_bias_correction_kl else kl", "kl"),
        "test_exact.test_kl_of_the_whole_completion", {"kind": "k3"}),
    Exhibit("TRL #3144: the clip metric counts the other tokens", rewrite(
        losses, "policy_loss", "mask & (x < -epsilon) & (A < 0)", "mask & (x > -epsilon) & (A < 0)"),
        "test_losses.test_clip_geometry", {"ratio": 0.5, "A": -1.5}),
    Exhibit("rasbt: the maximum where the advantage is negative", worst_of_both, "test_losses.test_clip_geometry",
            {"ratio": 0.5, "A": -1.5}),
    Exhibit("mlx-lm-lora #55: an unknown ratio level is a log-ratio of 0", rewrite(
        losses, "log_ratios", "raise ValueError(f\"importance_sampling_level must be one of {', '.join(RATIO_LEVELS)}, "
        "got {level!r}\")", "return 0 * token"), "test_losses.test_unknown_choices_raise",
        {"call": lambda: test_losses.policy(*test_losses.policy_batch(), level="sequences")}),
    Exhibit("nano-aha: the loss writes into its inputs", rewrite(
        losses, "policy_loss", "logps = torch.where(mask, logps, 0.0)", "logps.data[~mask] = 0.0"),
        "test_losses.test_inputs_are_not_changed"),
    Exhibit("possible: DiscoPOP's gate of 0 times an overflow", unclamped,
            "test_losses.test_outliers_stay_finite_in_every_pair_loss"),
    Exhibit("possible: a hand-written backward without the temperature", rewrite(
        model.ChunkedLogps, "backward", "grad_logps[at, None] / ctx.temperature", "grad_logps[at, None]"),
        "test_group_rows.test_chunked_logps_value_and_gradient", {"tokens": 5}),
    # resume, checkpoints, export
    Exhibit("transformers #40691: every epoch in the order of the first", rewrite(
        data, "draw_plan", "[seed, epoch]", "[seed, 0]"), "test_data.test_draw_plan_covers_each_row_once_an_epoch"),
    Exhibit("open-instruct #681: what a resume skips is skipped in every epoch", rewrite(
        data, "draw_plan", "for i in order if", "for i in order[2:] if"),
        "test_data.test_draw_plan_covers_each_row_once_an_epoch"),
    Exhibit("open-instruct #1823: --resume with a typo starts anew", rewrite(
        model, "_open_run", 'if args.resume not in ("auto", "never"):', "if False:"), "a_typo_in_resume_is_an_error"),
    Exhibit("ours: checkpoints without a manifest were a fresh start", rewrite(
        model, "load_checkpoint", "if any(all_gather_object(bool(candidates or found))):", "if candidates:"),
        "checkpoints_without_a_manifest_are_no_fresh_start"),
    Exhibit("ours: a resumed run wrote over the checkpoint it came from", rewrite(
        model.Saver, "save", 'if self.saved == state["step"]:', "if False:"),
        "what_was_resumed_from_is_not_written_again"),
    Exhibit("ours: DCP's CheckpointException is no Exception", rewrite(
        model, "save_checkpoint", "except dcp.CheckpointException as reason:", "except ZeroDivisionError as reason:"),
        "test_faults.test_one_rank_cannot_write", {"bad": 1}, slow=True),
    Exhibit("Automodel #3254, ours: an error of rank 0 alone leaves the others waiting", rewrite(
        model, "on_rank_0", 'answer = InputError(f"{what}: {error}")', "raise"),
        "test_faults.test_a_folder_that_only_rank_0_cannot_make", slow=True),
    Exhibit("ours: a garbage line of metrics.jsonl raised on rank 0 alone", rewrite(
        model, "forget_after", "except (ValueError, KeyError, TypeError):", "except ZeroDivisionError:"),
        "test_faults.test_garbage_in_metrics_is_dropped_and_said"),
    Exhibit("ours: an optimizer without a state was saved with one of one step", rewrite(
        model, "save_checkpoint", "if optimizer.state:", "if True:"),
        "test_faults.test_a_checkpoint_before_the_first_step"),
    Exhibit("ours: an old checkpoint that cannot be deleted was a failed save", rewrite(
        model, "drop_checkpoint", "except OSError as reason:", "except ZeroDivisionError as reason:"),
        "test_faults.test_an_old_checkpoint_that_cannot_be_deleted"),
    Exhibit("KempnerForge #49: exists() differs between ranks", rewrite(
        model, "load_checkpoint", "candidates = all_gather_object(candidates)[0]", "all_gather_object(candidates)"),
        "test_faults.test_ranks_that_see_different_files", slow=True),
    Exhibit("ours: the signal that torchrun passes on was a second one", rewrite(
        model.Stop, "_handle", "if self.asked and now - self.since > 2:", "if self.asked:"),
        "test_resume.test_a_second_signal_ends_at_once"),
    Exhibit("EasyR1 #48, ours: the processor is not saved", around(
        model, "export", without_processor), "test_data.test_export_from_a_hub_id"),
    Exhibit("ours: a bf16 export held tied weights twice", rewrite(
        model, "export", "{id(x): name for name", "{name: name for name"),
        "test_data.test_bf16_export_is_bf16_and_tied_weights_stay_one"),
    Exhibit("ours: a photograph's EXIF tags were written anew, which odd ones cannot be", rewrite(
        data, "decode_image", "opened.transpose(TURNS[shown]) if shown in TURNS else opened",
        '__import__("PIL.ImageOps").ImageOps.exif_transpose(opened)'),
        "test_faults.test_exif_is_read_not_written", red=(data.RowError,)),
    Exhibit("ours: a role that no template knows went to the model", rewrite(data, "to_messages", "if unknown:", "if False:"),
            "test_data.test_odd_prompts_are_refused", {"prompt": [{"role": "User", "content": "x"}]}),
    Exhibit("ours: dynamic sampling threw away the groups that NGRPO is for", rewrite(
        train_grpo, "choose_groups", 'if estimator == "ngrpo"', "if False"), "test_rewards.test_choose_groups"),
    Exhibit("ours: a preset's weights were held against another --loss_type", rewrite(
        model, "parse_args", "if first.loss_type is not None:", "if False:"),
        "test_runs.test_presets_set_defaults_and_flags_win", red=(SystemExit,)),
]

GREEN = set()  # checks that have passed without a patch


@pytest.mark.parametrize("exhibit", [pytest.param(e, id=e.bug, marks=[pytest.mark.slow] if e.slow else [])
                                     for e in EXHIBITS])
def test_exhibit(exhibit, request, monkeypatch, tmp_path_factory):
    """A test that stays green with the bug in place guards nothing."""
    module, _, name = exhibit.check.rpartition(".")
    check = getattr(globals()[module], name) if module else globals()[name]

    def run():
        own = {"tmp_path": tmp_path_factory.mktemp("museum"), "monkeypatch": pytest.MonkeyPatch()} | exhibit.case
        names = inspect.signature(check).parameters
        try:
            check(**{name: own[name] if name in own else request.getfixturevalue(name) for name in names})
        finally:
            own["monkeypatch"].undo()

    key = (exhibit.check, str(exhibit.case))
    if key not in GREEN:
        run()
        GREEN.add(key)
    exhibit.patch(monkeypatch, request.getfixturevalue)
    with pytest.raises((*RED, *exhibit.red)):
        run()
