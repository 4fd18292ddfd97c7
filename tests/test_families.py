"""Model families: what all of them share is tested over FAMILIES in the other files; here each in both scripts, and
what a family may not have."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from conftest import (FAMILIES, ROOT, TEXT_ONLY, VISION, InProcess, build_tiny_text, close_to_scale, few, make_group, make_row,
                      run)
from test_group_rows import assert_same_gradients, gradients, transformers_logps
from test_runs import SCRIPTS, write_task

import data
import model
import rollout


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """(folder with rows.jsonl of 0, 1 and 2 images and rewards.py, and with texts.jsonl, the same without images)"""
    folder = tmp_path_factory.mktemp("families")
    write_task(folder)
    with open(folder / "texts.jsonl", "w") as file:
        for line in open(folder / "pairs.jsonl"):
            file.write(json.dumps(json.loads(line) | {"images": []}) + "\n")
    return folder


@pytest.mark.parametrize("family", few(FAMILIES, "qwen2_5_vl", "gemma3", "llama"))
def test_both_scripts_train_and_reload(folders, loaded, tasks, monkeypatch, tmp_path, capsys, family):
    """A step of MPO and one of GRPO from the command line: the losses of step 1, language model and vision tower that
    both move, and a `final/` that loads with the same weights and trains on."""
    loaded(family)  # or the test is skipped
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rollout, "RewardRunner", InProcess)
    source, seen = str(folders[family]), {}
    rows = tasks / ("texts.jsonl" if family in TEXT_ONLY else "pairs.jsonl")
    export = model.export

    def keep(policy, *args):
        seen.update({name: tensor.clone() for name, tensor in policy.hf.state_dict().items()})
        export(policy, *args)

    monkeypatch.setattr(model, "export", keep)
    common = ["--dataset", str(rows), "--image_root", str(tasks), "--max_steps", "1", "--warmup_steps", "0",
              "--learning_rate", "1e-3", "--max_completion_length", "5"]
    for name, extra in (("train_dpo", ["--algo", "mpo", "--per_device_train_batch_size", "6"]),
                        ("train_grpo", ["--num_generations", "4", "--per_device_train_batch_size", "24", "--reward_funcs",
                                        f"{tasks / 'rewards.py'}:spread"])):
        before = model.load_policy(source)[0].hf
        SCRIPTS[name].main([*common, *extra, "--model_name_or_path", source, "--output_dir", name])
        step = [json.loads(line) for line in open(f"{name}/metrics.jsonl")][-1]
        assert step["grad_norm"] > 0
        if name == "train_dpo":
            assert step["loss/sigmoid"] == pytest.approx(0.6931, abs=1e-4)
            assert step["loss/bco_pair"] == pytest.approx(1.3863, abs=2e-4)
        else:
            assert step["ratio"] == 1 and step["sampling/sampling_logp_difference/mean"] < 1e-5
        source = f"{name}/final"  # GRPO goes on from MPO's
        after = model.load_policy(source)[0].hf
        weights = after.state_dict()
        assert weights.keys() == seen.keys() and all(torch.equal(weights[k], seen[k]) for k in seen)
        parts = [[hf.get_decoder(), *([] if family in TEXT_ONLY else [hf.get_encoder(modality="image")])]
                 for hf in (before, after)]
        for old, new in zip(*parts):
            assert not torch.equal(torch.cat([p.flatten() for p in old.parameters()]),
                                   torch.cat([p.flatten() for p in new.parameters()]))
    out = capsys.readouterr().out
    for note in model.load_policy(source)[0].notes:
        assert out.count(f": {note}\n") == 2


def tower_calls(hf):
    """A list that grows by one whenever the vision tower runs."""
    calls, kinds = [], (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear)
    first = next(m for m in hf.get_encoder(modality="image").modules() if isinstance(m, kinds))
    first.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("family", VISION)
def test_a_frozen_tower_runs_once(folders, loaded, family):
    """What a frozen tower made of a prompt's images serves every later pass, of another model (the reference) too, in a
    batch of prompts with 1, 0 and 2 images: log-probs and gradients, the projector's among them, are the same, but that the
    first pass has all images in one batch of the tower, and rounds as that does. What was kept is not used up."""
    loaded(family)  # or the test is skipped
    policy, processor = model.load_policy(str(folders[family]), freeze_vision_tower=True)
    groups = [make_group(policy, processor, images, [5, 3], seed=images) for images in (1, 0, 2)]
    calls, results = tower_calls(policy.hf), []
    for _ in range(3):
        logps, *_ = policy(policy.pack(groups))
        results.append((logps.detach(), gradients(policy, logps.sum())))
        if len(results) == 1:
            del calls[:]
            prompts = policy.run_frozen_tower([prompt for prompt, _ in groups])
            assert len(calls) == 2 and "tower" not in prompts[1].pixels  # once for each prompt with images
            sampled = rollout.sample(policy, prompts, [0, 1, 2], num_generations=2, max_completion_length=4,
                                     temperature=1.0, seed=0)
    with torch.no_grad():
        ref = loaded(family)[0](policy.pack(groups))[0]
    assert len(calls) == 2
    (first, first_grads), (second, second_grads), (third, third_grads) = results
    close_to_scale(second, first)
    assert_same_gradients(second_grads, first_grads)
    assert torch.equal(third, second) and third_grads.keys() == second_grads.keys()
    assert all(torch.equal(third_grads[name], second_grads[name]) for name in third_grads)
    close_to_scale(ref, first)
    groups = [(p, [sampled.completion_ids[n][sampled.completion_mask[n]] for n in (2 * i, 2 * i + 1)])
              for i, p in enumerate(prompts)]
    for prompt in prompts:
        prompt.pixels.pop("tower", None)
    again = policy(policy.pack(groups))[0]
    close_to_scale(sampled.sampling_logps, again)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_large_enough_for_a_gpu(loaded, family):
    """FlexAttention on CUDA refuses heads below 16: the family tests would not run on a GPU."""
    hf = loaded(family)[0].hf
    heads = {module.head_dim for module in hf.get_decoder().modules() if hasattr(module, "head_dim")}
    assert heads and min(heads) >= 16


WITH_TORCHVISION = """
import importlib.machinery, sys
from unittest.mock import MagicMock
for name in ("", ".io", ".ops", ".ops.boxes", *(".transforms" + x for x in ("", ".functional", ".v2", ".v2.functional"))):
    spec = importlib.machinery.ModuleSpec("torchvision" + name, None, is_package=True)
    sys.modules["torchvision" + name] = MagicMock(__spec__=spec, __path__=[], __version__="99")
from transformers.utils import is_torchvision_available
sys.path.insert(0, sys.argv[1])
import model
assert is_torchvision_available()
for folder in sys.argv[2:]:
    try:
        processor, fault = model.load_processor(folder), ""
        if getattr(processor, "video_processor", None) is not None:
            fault = "has a video processor"
    except Exception as error:
        fault = repr(error)
    print(folder, ":", fault or "loaded")
"""


@pytest.mark.slow
def test_processors_load_where_torchvision_is_installed(folders, tmp_path):
    """With torchvision, AutoProcessor wants a video processor's file: five families' folders could not be loaded on a GPU
    machine. Here transformers' own code loads them, in a process with a torchvision that is there, and never called."""
    dummy = getattr(transformers.Idefics3ImageProcessorPil, "is_dummy", False)  # as in `loaded`
    paths = [folders[family] for family in FAMILIES if family != "idefics3" or not dummy]
    out = run(sys.executable, "-c", WITH_TORCHVISION, ROOT, *paths, cwd=tmp_path)
    lines = [line for line in out.splitlines() if line.startswith(tuple(map(str, paths)))]
    assert lines == [f"{path} : loaded" for path in paths]


@pytest.mark.parametrize("frozen", [True, False])
def test_a_run_encodes_an_image_once_a_rollout(folders, tasks, monkeypatch, tmp_path, frozen):
    """Two iterations over a rollout, and a reference: sampling, old and reference log-probs and both updates share one
    pass of a frozen tower over 4 prompts; one that is trained runs in all of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rollout, "RewardRunner", InProcess)
    load, calls = model.load_policy, []

    def watched(*args, **kwargs):
        policy, processor = load(*args, **kwargs)
        calls.append(tower_calls(policy.hf))
        return policy, processor

    monkeypatch.setattr(model, "load_policy", watched)
    rows = [json.loads(line) for line in open(tasks / "pairs.jsonl")]
    with open("images.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows if len(row["images"]) == 1)
    SCRIPTS["train_grpo"].main([
        "--model_name_or_path", str(folders["qwen2_5_vl"]), "--dataset", "images.jsonl", "--image_root", str(tasks),
        "--num_generations", "2", "--per_device_train_batch_size", "8", "--num_iterations", "2", "--beta", "0.1",
        "--max_completion_length", "5", "--max_steps", "2", "--output_dir", "run", "--reward_funcs",
        f"{tasks / 'rewards.py'}:spread", *(["--freeze_vision_tower"] if frozen else [])])
    assert [len(x) for x in calls] == ([4, 0] if frozen else [4, 1])


def test_what_a_family_lacks_is_said(loaded):
    """One line at the start for what a family cannot have; nothing for those that have all."""
    assert loaded("qwen2_5_vl")[0].notes == loaded("internvl")[0].notes == []
    assert "auxiliary loss is not added" in loaded("qwen3_vl_moe")[0].notes[0]
    assert "row with images is an error" in loaded("llama")[0].notes[0]
    assert "a CPU computes masked positions too" in loaded("gemma3")[0].notes[0]
    assert set(model.TESTED) == set(FAMILIES)


def test_a_text_only_model_refuses_images(loaded):
    """Never drop an image: a row that has one names itself."""
    policy, processor = loaded("llama")
    with pytest.raises(data.RowError, match="row 3: .*text-only model takes no images"):
        data.encode_prompt(policy, processor, make_row(1, 3))


@pytest.mark.parametrize("change, message", [
    (dict(layer_types=["full_attention", "linear_attention"]), "layers with linear_attention are not supported"),
    (dict(attn_logit_softcapping=30.0), "attention with soft-capping"),
    (dict(final_logit_softcapping=30.0), "soft-capping or a bias")])
def test_what_is_not_supported_is_refused(folders, change, message):
    """Layers whose attention is another than the mask's, or a head that is no matrix, would train something else."""
    processor = model.load_processor(str(folders["gemma3"]))
    hf = model.AutoModelForImageTextToText.from_pretrained(folders["gemma3"])
    for key, value in change.items():
        setattr(hf.config.text_config, key, value)
    with pytest.raises(model.InputError, match=message):
        model.Policy(hf, processor)


@pytest.mark.parametrize("family, more, message", [
    ("Granite", dict(logits_scaling=8.0), "granite is not supported: its log-probs in a group row differ"),
    ("Cohere", dict(logit_scale=0.0625), "cohere is not supported"), ("Falcon", dict(new_decoder_architecture=True), "falcon is not supported"),
    ("Mistral", {}, None), ("Granite", dict(logits_scaling=1.0), None)])
def test_an_untested_family_computes_its_own_log_probs(tmp_path, family, more, message):
    """A head that scales its logits, or attention that reads the placeholder of a mask, trained something else, and sampler
    and trainer agreed on it: no metric showed it. Families that no test covers are compared once, when they are loaded."""
    build_tiny_text(tmp_path / "model", family, **more)
    if message is None:
        assert "not among the families" in model.load_policy(str(tmp_path / "model"))[0].notes[0]
    else:
        with pytest.raises(model.InputError, match=message):
            model.load_policy(str(tmp_path / "model"))


def test_the_templates_end_of_turn_ends_an_answer(folders, tmp_path):
    """A base model: tokenizer and generation_config end with <|endoftext|>, the chat template ends a turn with <|im_end|>. A
    sampled <|im_end|> did not end an answer, SFT trained two ends, and final/ would have gone on after the first."""
    shutil.copytree(folders["qwen2_5_vl"], tmp_path / "base")
    for name, eos in ("tokenizer_config.json", "<|endoftext|>"), ("generation_config.json", 0):
        file = tmp_path / "base" / name
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"eos_token" if name[0] == "t" else "eos_token_id": eos}))
    policy, processor = model.load_policy(str(tmp_path / "base"))
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert processor.tokenizer.eos_token == "<|endoftext|>" and policy.eos_ids == sorted([0, end])
    assert policy.notes == ["<|im_end|>, which the chat template writes after an answer, ends one here"]
    row = make_row(0) | {"chosen": "<answer>4</answer>"}
    ids = data.encode_completion(policy, processor, row, "chosen").tolist()
    assert ids[-1] == end and not {0, end} & set(ids[:-1])
    prompt = data.encode_prompt(policy, processor, row)
    policy.never_sampled = torch.tensor([i for i in range(len(processor.tokenizer)) if i != end])
    sampled = rollout.sample(policy, [prompt], [0], num_generations=2, max_completion_length=5, temperature=1.0, seed=0)
    assert sampled.completion_ids.tolist() == [[end], [end]] and not sampled.truncated.any()
    model.export(policy, tmp_path / "final")
    assert json.loads((tmp_path / "final" / "generation_config.json").read_text())["eos_token_id"] == policy.eos_ids


def test_a_template_that_ends_no_turn_takes_eos_token(folders, tmp_path):
    """--eos_token, as TRL names it: the token that ends an answer where nothing else says it, in training and in sampling;
    one that the tokenizer does not know is an error."""
    build = shutil.copytree(folders["qwen2_5_vl"], tmp_path / "model")
    template = build / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", ""))
    policy, processor = model.load_policy(str(build), eos_token="<|endoftext|>")
    assert data.encode_completion(policy, processor, make_row(0) | {"chosen": "4"}, "chosen").tolist()[-1] == 0
    assert 0 in policy.eos_ids
    with pytest.raises(model.InputError, match="--eos_token <eos>: the tokenizer of .* has no such token"):
        model.load_policy(str(build), eos_token="<eos>")


def test_windows_count_tokens_not_mrope_positions(folders, tmp_path):
    """Qwen2.5-VL with sliding layers: an image spans fewer positions than tokens, and the window counts tokens, in
    training and in decoding."""
    shutil.copytree(folders["qwen2_5_vl"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"] |= dict(use_sliding_window=True, sliding_window=8, max_window_layers=1,
                                  layer_types=["full_attention", "sliding_attention"])
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    policy, processor = model.load_policy(str(tmp_path / "model"))
    groups = [make_group(policy, processor, images, [12, 5], seed=images) for images in (0, 1, 2)]
    logps, *_ = policy(model.pack_groups(groups, policy.pad_id, True), 0.7)
    for n, expected in enumerate(x for group in groups for x in transformers_logps(policy, group, 0.7)):
        close_to_scale(logps[n, :len(expected)], expected)
    prompts = [prompt for prompt, _ in groups]
    sampled = rollout.sample(policy, prompts, [0, 1, 2], num_generations=2, max_completion_length=20, temperature=1.0, seed=0)
    groups = [(p, [sampled.completion_ids[n][sampled.completion_mask[n]] for n in (2 * i, 2 * i + 1)])
              for i, p in enumerate(prompts)]
    again = policy(model.pack_groups(groups, policy.pad_id, True))[0]
    close_to_scale(sampled.sampling_logps, again)
