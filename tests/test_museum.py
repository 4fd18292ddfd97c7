"""The bug museum: real bugs, other systems' and this one's own, put back one at a time; a test of ours must go red.

Each exhibit names the bug, a patch that brings it back, and the check (file.test of this folder, with the arguments of
one of its cases), which passes without the patch. "ours" stood in this code once, "possible" are nobody's that we know
of. A patch changes what a function takes or gives, and knows nothing of its source: so the function may be written
anew, and its exhibits stay. One that moves takes its exhibit along: the name here is then an AttributeError.
"""

# ruff: noqa: F401 (checks and their fixtures are taken by name)

import inspect
import json
import math
import os
import re
import shutil
import struct
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
import torch.distributed as dist
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from test_data import root
from test_faults import pytestmark, returns, runner
from test_runs import launch, task

import data
import losses
import model
import rollout
import train_dpo
import train_grpo
from rewards import answers, form
from rewards import runner as reward_runner

RED = (AssertionError, pytest.fail.Exception)  # the second is `pytest.raises` that saw nothing raised


def around(owner, name, wrapper):
    """A patch: wrapper(the original, *its arguments, **its keywords) in the place of owner.name."""
    def patch(monkeypatch, _):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))

    return patch


def instead(owner, name, value):
    """A patch: another value in the place of owner.name."""
    return lambda monkeypatch, _: monkeypatch.setattr(owner, name, value)


# --- room 1: images and prompts


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


def no_filler(_, policy, groups, *args, **kwargs):
    """The groups as they are, also where none has an image."""
    return model.pack_groups(groups, policy.pad_id, one_row=True)


def one_prompt_a_row(original, *args, **kwargs):
    """The lengths of a row say that its later prompts are completions of its first."""
    batch = original(*args, **kwargs)
    merged = []
    for (first, completions), *others in batch["segments"]:
        merged.append([(first, [*completions, *(n for P, lengths in others for n in (P, *lengths))])])
    return batch | {"segments": merged}


def padding_sees_nothing(original, segment_ids, group_ids, *args):
    return original(segment_ids, group_ids, *args) & (group_ids >= 0)[:, None, :, None]


def converted_at_once(of_kind):
    """A wrapper: pictures of that kind are what Pillow's convert() makes of them."""
    def wrapper(original, file, *args):
        with Image.open(file) as opened:
            return opened.convert("RGB") if of_kind(opened) else original(file, *args)

    return wrapper


def tags_written(_, file, *args):
    with Image.open(file) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def fetched(original, image, row):
    """What a URL leads to stands for an image."""
    return Image.new("RGB", (8, 8)) if "://" in image else original(image, row)


def any_path(original, image, row):
    """The root is where relative paths start, and keeps none of them in."""
    return original(os.path.join(row["_image_root"], image), row | {"_image_root": "/"})


def own_keys_win(original, value, *args):
    """What a row says of its own place and root counts."""
    return original(value, *args) | {key: x for key, x in value.items() if key.startswith("_")}


def cut_at_eos(original, policy, processor, row, column, *begun):
    """What stands behind an end-of-turn token in the answer is lost without a word."""
    answer = row[column].split(processor.tokenizer.eos_token)[0]
    return original(policy, processor, row | {column: answer}, column, *begun)


def any_role(original, row):
    """Roles go on as they are, also those that no template knows."""
    messages = original(row | {"prompt": [message | {"role": "user"} for message in row["prompt"]]})
    return [ours | {"role": theirs["role"]} for ours, theirs in zip(messages, row["prompt"])]


# --- room 2: sampling


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


def first_id_at_zero(original, logits, uniforms, *args, **kwargs):
    """A uniform of 0 is the first id, be its probability 0."""
    token, logp = original(logits, uniforms, *args, **kwargs)
    return torch.where(uniforms == 0, 0, token), logp


def end_of_the_block(original, logits, uniforms, *args, **kwargs):
    """The sum of the blocks before is not taken off the target: it is beyond every id of its block but the last."""
    token, logp = original(logits, uniforms, *args, **kwargs)
    last = (token // 256 * 256 + 255).clamp(max=logits.shape[-1] - 1)
    return torch.where(token < 256, token, last), logp


# --- room 3: sums, counts, ranks


def mean_over_completions(original, logps, *args, **kwargs):
    """Of the micro-batch's own."""
    loss, metrics = original(logps, *args, **kwargs)
    return loss / len(logps), metrics


def mean_over_tokens(original, logps, old_logps, A, mask, **kwargs):
    """Of the micro-batch's own."""
    loss, metrics = original(logps, old_logps, A, mask, **kwargs)
    return loss / mask.sum(), metrics


def divided_again(original, logps, *args, **kwargs):
    """By the number of micro-batches of the 12 completions, which the count knows already."""
    loss, metrics = original(logps, *args, **kwargs)
    return loss / (12 // len(logps)), metrics


def norm_of_own_shards(_, parameters, max_norm):
    return float(sum(p.grad.to_local().norm() for p in parameters))


# --- room 4: advantages and rewards


def every_gth_is_a_group(original, rewards, G, **kwargs):
    A = original(rewards.view(G, -1).T.flatten(), G, **kwargs)
    return A.view(-1, G).T.flatten()


def formula_alone(_, rewards, G, **kwargs):
    """(r - mean) / (std + 1e-4), whatever the rewards."""
    groups = rewards.view(-1, G)
    x = groups - groups.mean(-1, keepdim=True)
    std = (x.square().sum(-1, keepdim=True) / (G - 1)).sqrt()
    return (x / (std + 1e-4)).flatten()


def repeated(original, result, columns, rows):
    """One reward is that of all completions."""
    return original(result * len(rows) if len(result) == 1 else result, columns, rows)


def no_second_try(original, *args, **kwargs):
    """A process that died is an error of the function, and not of one completion."""
    try:
        return original(*args, **kwargs)
    except reward_runner.ProcessLost as error:
        raise rollout.RewardError(str(error)) from error


def one_line_only(original, completions, **columns):
    """A dot matches no newline."""
    return [0.0 if "\n" in text else score for text, score in zip(completions, original(completions, **columns))]


def any_first_letter(original, text, *args, **kwargs):
    """A letter that the text begins with is a choice, whatever follows."""
    first = re.match(r"\(?([A-Ja-j])\b", text)
    return first[1].upper() if first else original(text, *args, **kwargs)


def no_estimator(original, parts, weights, G, count, *_):
    """Groups are chosen alike for every estimator."""
    return original(parts, weights, G, count)


# --- room 5: losses


def no_sampling_term(original, *args, **kwargs):
    return original(*args, **kwargs | {"use_bias_correction_kl": False})


def other_tokens(original, *args, **kwargs):
    """Those that are not clipped are counted."""
    loss, metrics = original(*args, **kwargs)
    clipped, tokens = metrics["clip_ratio/low_mean"]
    return loss, metrics | {"clip_ratio/low_mean": (tokens - clipped, tokens)}


def worst_of_both(original, logps, old_logps, A, mask, *, epsilon, epsilon_high, **kwargs):
    """PPO's bound taken as a maximum where A < 0, which cuts what it should keep and keeps what it should cut."""
    _, metrics = original(logps, old_logps, A, mask, epsilon=epsilon, epsilon_high=epsilon_high, **kwargs)
    ratio, A = (logps - old_logps).exp(), A[:, None]
    plain, clipped = ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon_high) * A
    return -torch.where(A > 0, torch.min(plain, clipped), torch.max(plain, clipped)).sum(), metrics


def unknown_is_zero(original, logps, *args):
    """A level that is none of them gives a ratio of 1 and no gradient."""
    try:
        return original(logps, *args)
    except ValueError:
        return torch.zeros_like(logps)


def clears_the_padding(original, logps, old_logps, A, mask, **kwargs):
    """In the tensor that it was given."""
    logps.data[~mask] = 0.0
    return original(logps, old_logps, A, mask, **kwargs)


def unclamped(monkeypatch, _):
    """DiscoPOP as it is written down: e^89 is inf, and 0 * inf is nan."""
    def discopop_loss(r_w, r_l, *, beta, discopop_tau, **_):
        m = beta * (r_w - r_l)
        mu = (m / discopop_tau).sigmoid()
        return -(1 - mu) * torch.nn.functional.logsigmoid(m) + mu * (-m).exp()

    monkeypatch.setitem(losses.PAIR_LOSSES, "discopop", losses.PAIR_LOSSES["discopop"]._replace(term=discopop_loss))


def slope_of_temperature_1(original, ctx, grad_logps, *others):
    return original(ctx, grad_logps * ctx.temperature, *others)


# --- room 6: resume, checkpoints, export


def first_epoch_again(original, plan, dataset, epoch):
    return original(plan, dataset, 0)


def skipped_for_good(original, sizes, num_draws, seed, **kwargs):
    """The two draws that a resume passes over are rows that never come again."""
    return original(sizes, num_draws, seed, **{"dropped": set(original(sizes, 2, seed)), **kwargs})


def no_manifest_is_no_run(original, output_dir, *args):
    """Where no checkpoint is complete, the run starts from the beginning."""
    return original(output_dir, *args) if model.checkpoints_in(output_dir) else (None, {})


def forgets_what_is_there(original, run, *args, **kwargs):
    run.saved = None
    return original(run, *args, **kwargs)


def before_the_collective(_, what, function):
    """Rank 0 calls it first: its error is out before the others have their answer."""
    answer = function() if dist.get_rank() == 0 else None
    return model.all_gather_object(answer)[0]


def believes_every_line(original, output_dir, *args):
    for line in (output_dir / "metrics.jsonl").read_text().splitlines():
        json.loads(line)["step"]
    original(output_dir, *args)


def made_up_state(original, output_dir, policy, optimizer, *args, **kwargs):
    """torch, asked for the state of an optimizer that has none, lets it take a step first."""
    torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(policy, optimizer)
    return original(output_dir, policy, optimizer, *args, **kwargs)


def own_list_first(original, value):
    """Of the lists of all ranks each takes its own."""
    return [value] if isinstance(value, list) else original(value)


def insists_at_once(original, stop, *args):
    """Whenever the signal comes, the one before it was long ago."""
    stop.since -= 60
    return original(stop, *args)


def without_processor(original, policy, folder, rank=0):
    original(policy, folder, rank)
    for name in ("processor_config.json", "preprocessor_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)


def head_written_again(original, policy, folder, rank=0):
    """The output head, though it is the embeddings."""
    original(policy, folder, rank)
    head = policy.hf.get_output_embeddings().weight.detach().to(policy.dtype, copy=True)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": head}, file, {"format": "pt"})


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


def checkpoints_without_a_manifest_are_no_fresh_start(tmp_path):
    assert test_faults.save(tmp_path, 1, *test_faults.parts())
    (tmp_path / "checkpoints" / "step_1" / "manifest.json").unlink()
    with pytest.raises(model.InputError, match="none of the checkpoints"):
        model.load_checkpoint(tmp_path, *test_faults.parts(), None, 0)


def what_was_resumed_from_is_not_written_again(tmp_path):
    """With --save_total_limit 1 it is the only checkpoint there is."""
    policy, optimizer = test_faults.parts()
    run = model.Run(train_dpo.parse_args(["--output_dir", str(tmp_path / "r"), "--save_total_limit", "1"]))
    assert test_faults.save(tmp_path / "r", 3, policy, optimizer)
    before = (tmp_path / "r" / "checkpoints" / "step_3").stat().st_ino
    run.models, run.saved = (policy, optimizer, None), 3  # as `restore` leaves them
    run.save({"step": 3}, must=True)
    assert (tmp_path / "r" / "checkpoints" / "step_3").stat().st_ino == before


# --- the exhibits


class Exhibit(NamedTuple):
    bug: str      # whose, and what
    patch: object  # (monkeypatch, request.getfixturevalue) -> None
    check: str    # file.test, or a function above
    case: dict = {}  # arguments that are no fixtures
    red: tuple = ()  # how else it may fail: an exception that the bug itself raises
    slow: bool = False


QWEN = {"family": "qwen2_5_vl"}
MIXED = {"batch": test_group_rows.BATCHES["mixed, uneven, padded"]}
PACKED = "test_group_rows.test_packed_equals_transformers_one_by_one"
BAD_IMAGE = "test_data.test_bad_images_name_row_and_file"
SHOWN = "test_faults.test_images_are_rgb_as_shown"
SAMPLER = "test_sampler.test_sampler_equals_trainer"
CUTS = "test_runs.test_grpo_gradients_do_not_depend_on_micro_batches"
CLIP = "test_losses.test_clip_geometry"
PLAN = "test_data.test_plan_covers_each_row_once_an_epoch"

EXHIBITS = [
    # --- room 1: images and prompts
    Exhibit("TRL #5785: image markers padded on the other side than the prompt",
            around(model.Policy, "prompt_positions", shifted_markers),
            PACKED, QWEN | {"batch": test_group_rows.BATCHES["one image"], "one_row": False}),
    Exhibit("TRL #5283: truncation drops the image tokens, the loss still falls",
            around(data, "encode_prompt", keep_end), "test_group_rows.test_pixels_matter"),
    Exhibit("verl #4999: the length filter popped the images first",
            around(data, "encode_prompt", pops_images), "test_data.test_prompt_is_what_the_processor_makes", QWEN),
    Exhibit("miles #2406, torchtitan #4777: a rank without images does not enter the vision tower",
            around(model.Policy, "pack", no_filler), "every_rank_runs_the_vision_tower"),
    Exhibit("possible: pictures in another order than their groups",
            around(model, "cat_pixels", lambda original, prompts: original(prompts[::-1])),
            PACKED, QWEN | MIXED | {"one_row": True}),
    Exhibit("possible: a completion attends to the prompts before its own",
            around(model, "pack_groups", one_prompt_a_row), "test_group_rows.test_segments_are_the_dense_mask", MIXED),
    Exhibit("ours: a padding token that attends to nothing",
            around(model, "group_attention_mask", padding_sees_nothing), "test_group_rows.test_attention_mask_rule"),
    Exhibit("ours: a 16-bit picture is white",
            around(data, "decode_image", converted_at_once(lambda image: image.mode == "I;16")), SHOWN),
    Exhibit("ours: black on transparent is black on black",
            around(data, "decode_image", converted_at_once(lambda image: image.has_transparency_data)), SHOWN),
    Exhibit("ours: a photograph's EXIF tags were written anew, which odd ones cannot be",
            around(data, "decode_image", tags_written), "test_faults.test_exif_is_read_not_written",
            red=(struct.error,)),
    Exhibit("Pillow only warns of 144 megapixels, and decodes them",
            instead(data, "MAX_IMAGE_PIXELS", math.inf), "test_faults.test_decompression_bombs_are_not_decoded",
            {"size": (12_000, 12_000)}, red=(TypeError,)),  # the test takes the decoder away: None is called
    Exhibit("torchtitan #4293: an image URL of a row is fetched",
            around(data, "load_image", fetched), BAD_IMAGE,
            {"image": "https://example.com/a.png", "message": "URLs are not fetched"}),
    Exhibit("FastChat #3873, LLaMA-Factory #8556: ../../etc/passwd is an image",
            around(data, "load_image", any_path), BAD_IMAGE,
            {"image": "../outside.png", "message": "outside --image_root"}),
    Exhibit("ours: a row's own _image_root won over the flag",
            around(data, "canonical", own_keys_win), "test_data.test_a_row_cannot_move_its_root"),
    Exhibit("ours: an answer was cut at an EOS inside it",
            around(data, "encode_completion", cut_at_eos), "test_data.test_bad_pairs_are_refused",
            {"column": "chosen", "value": "4<|im_end|>lost", "message": "only the chat template"}),
    Exhibit("ours: a role that no template knows went to the model",
            around(data, "to_messages", any_role), "test_data.test_odd_prompts_are_refused",
            {"prompt": [{"role": "User", "content": "x"}]}),
    Exhibit("transformers runs on with a model that brings its own code",
            around(model, "check_config", lambda *_: None), "test_faults.test_models_that_are_not_loaded"),

    # --- room 2: sampling
    Exhibit("R1-V #91, verl #3469: the policy samples <|image_pad|>",
            around(model, "scaled_logits", lambda _, logits, never, temperature: logits.float() / temperature),
            "test_sampler.test_placeholders_are_never_sampled", QWEN),
    Exhibit("TRL #4159: no temperature in the trainer's log-probs",
            around(model.Policy, "forward", no_temperature), SAMPLER, QWEN | {"temperature": 1.5}),
    Exhibit("TRL #6789: top-p renormalised in the sampler alone",
            around(rollout, "sample", renormalised),
            "test_sampler.test_narrowing_changes_the_draw_and_not_the_log_probs"),
    Exhibit("cs336 #15, rllm #816: decoded, and encoded again",
            encoded_again, SAMPLER, QWEN | {"temperature": 1.0}),
    Exhibit("tiny-grpo: the mask is ids != pad, and pad is EOS",
            around(rollout, "sample", mask_of_pads), "test_sampler.test_eos_ends_and_belongs_to_the_completion"),
    Exhibit("ours: searchsorted without right=True draws an id of probability 0",
            around(rollout, "sample_tokens", first_id_at_zero), "test_sampler.test_uniform_ends"),
    Exhibit("possible: a completion that takes the place of one that has ended leaves its keys behind",
            around(rollout.GroupCache, "move", lambda *_: None), SAMPLER, QWEN | {"temperature": 1.0}),
    Exhibit("possible: an inverse CDF by blocks whose target is still that of the whole",
            around(rollout, "sample_tokens", end_of_the_block), "test_sampler.test_blocks_are_one_cdf",
            {"vocabulary": 300}),
    Exhibit("possible: a hash that forgets k gives a group of one answer",
            around(rollout, "keyed_uniform", lambda original, seed, draw, k, t: original(seed, draw, 0 * k, t)),
            "test_sampler.test_randomness_belongs_to_the_draw"),

    # --- room 3: sums, counts, ranks
    Exhibit("TRL #3021, transformers #34191: a mean of the micro-batch",
            around(losses, "policy_loss", mean_over_completions),
            "test_losses.test_sum_over_count_is_split_invariant", {"parts": 1}),
    Exhibit("open-instruct #1161: token means per micro-batch",
            around(losses, "policy_loss", mean_over_tokens), CUTS, {"loss_type": "dapo"}, slow=True),
    Exhibit("ms-swift #10117: divided by the accumulation again",
            around(losses, "policy_loss", divided_again), CUTS, {"loss_type": "grpo"}, slow=True),
    Exhibit("NeMo Automodel #3830: world_size times a local mean",
            around(model, "all_reduce_sums", lambda _, sums, device="cpu": sums),
            "test_faults.test_counts_are_those_of_all_ranks"),
    Exhibit("pytorch #77562: a decision, here to skip a step, from one rank's numbers",
            around(model, "clip_grad_norm_", norm_of_own_shards), "test_faults.test_nan_on_one_rank_is_seen_by_all"),

    # --- room 4: advantages and rewards
    Exhibit("Search-R1 #88: a group is not the completions of one prompt",
            around(losses, "group_advantages", every_gth_is_a_group), "test_losses.test_group_advantages_by_hand"),
    Exhibit("DeepAnalyze #116: the std of a group of one",
            around(losses, "group_advantages", formula_alone), "test_losses.test_group_of_one_is_refused"),
    Exhibit("TRL: the rounding of a mean, over 1e-4, is an advantage",
            around(losses, "group_advantages", formula_alone), "test_losses.test_equal_rewards_give_exactly_zero"),
    Exhibit("ms-swift #8123: None makes the advantages nan",
            around(losses, "weighted_rewards", lambda _, scores, weights: (weights[:, None] * scores).sum(0)),
            "test_losses.test_weighted_rewards_skip_who_abstained"),
    Exhibit("TRL #6533: one reward is broadcast to all",
            around(reward_runner, "checked_rewards", repeated), "test_faults.test_what_a_reward_may_return",
            {"what": "[1.0]", "expected": "expected 3 rewards"}),
    Exhibit("verl #6673, UniRL #462: one completion that the grader dies of ends the run",
            around(rollout.RewardRunner, "_call", no_second_try), "test_faults.test_rewards_that_crash",
            red=(rollout.RewardError,)),
    Exhibit("open-r1 #237, R1-V #19: a format pattern without DOTALL",
            around(form, "think_format", one_line_only), "test_rewards.test_format",
            {"text": "<think>a\nb</think>\n<answer>4</answer>", "expected": 1}),
    Exhibit("ours: 'A picture' is choice A",
            around(answers, "read_choice", any_first_letter), "test_rewards.test_accuracy",
            {"text": "A picture of two dogs.", "solution": "A", "expected": 0}),
    Exhibit("ours: dynamic sampling threw away the groups that NGRPO is for",
            around(train_grpo, "choose_groups", no_estimator), "test_rewards.test_choose_groups"),

    # --- room 5: losses
    Exhibit("NeMo-RL #2506, TRL #4638: the KL's gradient lacks the sampling term",
            around(losses, "policy_loss", no_sampling_term),
            "test_exact.test_kl_of_the_whole_completion", {"kind": "k3"}),
    Exhibit("TRL #3144: the clip metric counts the other tokens",
            around(losses, "policy_loss", other_tokens), CLIP, {"ratio": 0.5, "A": -1.5}),
    Exhibit("rasbt: the maximum where the advantage is negative",
            around(losses, "policy_loss", worst_of_both), CLIP, {"ratio": 0.5, "A": -1.5}),
    Exhibit("mlx-lm-lora #55: an unknown ratio level is a log-ratio of 0",
            around(losses, "log_ratios", unknown_is_zero), "test_losses.test_unknown_choices_raise",
            {"call": lambda: test_losses.policy(*test_losses.policy_batch(), level="sequences")}),
    Exhibit("nano-aha: the loss writes into its inputs",
            around(losses, "policy_loss", clears_the_padding), "test_losses.test_inputs_are_not_changed"),
    Exhibit("possible: DiscoPOP's gate of 0 times an overflow",
            unclamped, "test_losses.test_outliers_stay_finite_in_every_pair_loss"),
    Exhibit("possible: a hand-written backward without the temperature",
            around(model.ChunkedLogps, "backward", slope_of_temperature_1),
            "test_group_rows.test_chunked_logps_value_and_gradient", {"tokens": 5}),

    # --- room 6: resume, checkpoints, export
    Exhibit("transformers #40691: every epoch in the order of the first",
            around(data.Plan, "_order", first_epoch_again), PLAN),
    Exhibit("open-instruct #681: what a resume skips is skipped in every epoch",
            around(data, "Plan", skipped_for_good), PLAN),
    Exhibit("ours: checkpoints without a manifest were a fresh start",
            around(model, "load_checkpoint", no_manifest_is_no_run),
            "checkpoints_without_a_manifest_are_no_fresh_start"),
    Exhibit("ours: a resumed run wrote over the checkpoint it came from",
            around(model.Run, "save", forgets_what_is_there), "what_was_resumed_from_is_not_written_again"),
    Exhibit("ours: DCP's CheckpointException is no Exception",  # as for a handler that does not name it
            instead(torch.distributed.checkpoint, "CheckpointException", ZeroDivisionError),
            "test_faults.test_one_rank_cannot_write", {"bad": 1}, slow=True),
    Exhibit("Automodel #3254, ours: an error of rank 0 alone leaves the others waiting",
            around(model, "on_rank_0", before_the_collective),
            "test_faults.test_a_folder_that_only_rank_0_cannot_make", slow=True),
    Exhibit("ours: a garbage line of metrics.jsonl raised on rank 0 alone",
            around(model, "forget_after", believes_every_line),
            "test_faults.test_garbage_in_metrics_is_dropped_and_said"),
    Exhibit("ours: an optimizer without a state was saved with one of one step",
            around(model, "save_checkpoint", made_up_state), "test_faults.test_a_checkpoint_before_the_first_step"),
    Exhibit("ours: an old checkpoint that cannot be deleted was a failed save",
            around(model, "drop_checkpoint", lambda _, folder: shutil.rmtree(folder)),
            "test_faults.test_an_old_checkpoint_that_cannot_be_deleted"),
    Exhibit("KempnerForge #49: exists() differs between ranks",
            around(model, "all_gather_object", own_list_first),
            "test_faults.test_ranks_that_see_different_files", slow=True),
    Exhibit("ours: the signal that torchrun passes on was a second one",
            around(model.Stop, "_handle", insists_at_once), "test_resume.test_a_second_signal_ends_at_once"),
    Exhibit("EasyR1 #48, ours: the processor is not saved",
            around(model, "export", without_processor), "test_faults.test_only_a_models_files_reach_final"),
    Exhibit("ours: a bf16 export held tied weights twice",
            around(model, "export", head_written_again),
            "test_data.test_bf16_export_is_bf16_and_tied_weights_stay_one"),
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
