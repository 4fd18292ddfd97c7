"""Rows, images, templates: what is read, and what is refused with one clear error."""

import copy
import itertools
import json
import os
import threading
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import FAMILIES, TEXT_ONLY, VISION, make_row
from PIL import Image
from safetensors.torch import save_file

import data
import model


@pytest.fixture
def root(tmp_path):
    """An image root with good.png, and things that are no good image."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (48, 48), "red").save(folder / "good.png")
    good = (folder / "good.png").read_bytes()
    (folder / "truncated.png").write_bytes(good[:len(good) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.png").write_text("<html>404</html>")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    os.symlink("good.png", folder / "inside.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", folder / "link.png")
    return folder


def write(tmp_path, *lines, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


GOOD = {"prompt": "how many?", "image": "good.png", "solution": 4, "chosen": "4", "rejected": "5", "difficulty": 0.3}


def test_reads_rows_under_canonical_names(tmp_path, root):
    """Column aliases, one image or a list, other columns untouched, CRLF and a BOM; a row knows its line."""
    path = write(tmp_path, GOOD, "", {"question": "q", "images": ["good.png", "good.png"], "answer": "7", "id": 3})
    text = open(path).read().replace("\n", "\r\n")
    open(path, "w", encoding="utf-8-sig", newline="").write(text)
    first, second = data.read_rows(path, str(root), ("prompt", "solution"))
    assert first["images"] == ["good.png"] and first["difficulty"] == 0.3 and first["solution"] == 4
    assert (second["prompt"], second["solution"], second["answer"], second["id"]) == ("q", "7", "7", 3) and len(second["images"]) == 2
    assert second["_source"] == f"{path}:3"
    as_list = write(tmp_path, json.dumps([GOOD, GOOD]), name="rows.json")
    assert data.read_rows(as_list, None, ())[1]["_source"] == f"{as_list}[1]"


@pytest.mark.parametrize("lines, message", [
    (['{"prompt": "a"', ], ":1: not valid JSON"),
    ([GOOD, "[1, 2]"], ":2: expected an object, got list"),
    ([GOOD, '{"prompt": "a", "solution": NaN}'], ":2: not valid JSON: NaN"),
    ([GOOD, {"prompt": "a"}], ":2: no solution or answer"),
    ([{"prompt": None, "solution": 1}], ":1: no prompt or problem"),
    ([""], "no rows"), ([GOOD, "7"], ":2: expected an object, got int"), (["", "\t \r", "{"], ":3: not valid JSON"),
    ([{"prompt": "a", "solution": ""}], ":1: no solution or answer.*or an empty one")])
def test_malformed_rows_name_file_and_line(tmp_path, lines, message):
    """F19: one error with file:line and what was expected."""
    with pytest.raises(data.RowError, match=message) as error:
        list(data.read_rows(write(tmp_path, *lines), None, ("prompt", "solution")))
    assert "rows.jsonl" in str(error.value)


def test_a_row_cannot_write_to_the_terminal(tmp_path):
    """Escape sequences of a row's text reached the terminal by way of the error that quotes it."""
    with pytest.raises(data.RowError) as error:
        data.load_image("\x1b[2J\u202egood.png", {"_source": "f:1", "_image_root": str(tmp_path)})
    assert "\\x1b[2J\\u202egood.png does not exist" in str(error.value) and str(error.value).isprintable()


def test_a_row_cannot_move_its_root(tmp_path):
    """A dataset is data: a row that carries our own keys must not leave --image_root or forge its place."""
    path = write(tmp_path, GOOD | {"_image_root": "/", "_source": "elsewhere"})
    row = data.read_rows(path, "pictures", ())[0]
    assert row["_image_root"] == "pictures" and row["_source"] == f"{path}:1"


def test_missing_or_odd_file(tmp_path):
    """A wrong path or suffix says what was expected."""
    with pytest.raises(data.RowError, match=r"expected a \.jsonl, \.json or \.parquet"):
        data.read_rows(str(tmp_path / "none.jsonl"), None, ())
    with pytest.raises(data.RowError, match=r"expected a \.jsonl, \.json or \.parquet"):
        data.read_rows(write(tmp_path, GOOD, name="rows.csv"), None, ())
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(data.RowError, match="latin.jsonl:1: not UTF-8"):
        data.read_rows(str(tmp_path / "latin.jsonl"), None, ())[0]


@pytest.mark.parametrize("image, message", [
    ("missing.png", "does not exist"), ("truncated.png", "cannot be read"), ("empty.png", "cannot be read"),
    ("page.png", "cannot be read"), ("../outside.png", "outside --image_root images$"),
    ("link.png", "outside --image_root images: it is a link to .*outside.png"),
    ("pipe.png", "pipe.png is not a regular file"), ("folder.png", "folder.png is not a regular file"),
    ("/etc/hostname", "outside --image_root"), ("https://example.com/a.png", "URLs are not fetched"),
    ("data:image/png;base64,AAAA", "of 3 bytes cannot be read"), ("data:text/plain,x", "URLs are not fetched"), ("a\0b.png", "does not exist"),
    (7, "must be a path")])
def test_bad_images_name_row_and_file(root, monkeypatch, image, message):
    """F20, F23: missing, corrupt, outside the root (also by a symbolic link), or a URL. To open a pipe hung for ever. A
    link that stays inside is followed."""
    monkeypatch.chdir(root.parent)
    row = {"_source": "rows.jsonl:12", "_image_root": "images"}
    with pytest.raises(data.RowError, match=message) as error:
        data.load_image(image, row)
    assert "rows.jsonl:12" in str(error.value)
    assert data.load_image("good.png", row).getpixel((3, 3)) == data.load_image("inside.png", row).getpixel((3, 3)) == (255, 0, 0)
    with pytest.raises(data.RowError, match="--image_root is not given"):
        data.load_image("good.png", row | {"_image_root": None})


def test_transparency_is_shown_over_white(tmp_path):
    """Every value at every opacity is what Pillow's alpha_composite gives; that took 1.4 GB for 89 megapixels."""
    value, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    picture = Image.fromarray(np.stack([value, 255 - value, value // 2, alpha], 2))
    picture.save(tmp_path / "a.png")
    white = Image.new("RGBA", picture.size, "white")
    ours = data.load_image("a.png", {"_source": "f:1", "_image_root": str(tmp_path)})
    assert np.array_equal(np.array(ours), np.array(Image.alpha_composite(white, picture).convert("RGB")))


def test_large_pictures_are_decoded_one_at_a_time(root, monkeypatch):
    """Each thread decoded one of 89 megapixels, of 0.7 to 1.8 GB."""
    monkeypatch.setattr(data, "LARGE_IMAGE", 48 * 48 - 1)
    to_rgb, active, most = data.to_rgb, [], []

    def spy(opened):
        active.append(opened)
        time.sleep(0.01)  # lets the other threads in, if anything does
        most.append(len(active))
        active.remove(opened)
        return to_rgb(opened)

    monkeypatch.setattr(data, "to_rgb", spy)
    row = {"_source": "f:1", "_image_root": str(root)}
    assert len(list(data.in_order(lambda name: data.load_image(name, row), ["good.png"] * 8, 4))) == 8
    assert most == [1] * 8


def kinds(row):
    return [[b.get("text", "IMAGE") for b in m["content"]] for m in data.to_messages(row | {"_source": "f:1"})]


def test_where_images_stand():
    """In the text's own places, else before the first user text (also behind a system message)."""
    assert kinds({"prompt": "what?", "images": ["a", "b"]}) == [["IMAGE", "IMAGE", "what?"]]
    assert kinds({"prompt": "<image>\nis it <image>?", "images": ["a", "b"]}) == [["IMAGE", "\nis it ", "IMAGE", "?"]]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what?"}]
    assert kinds({"prompt": messages, "images": ["a"]}) == [["be brief"], ["IMAGE", "what?"]]
    blocks = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "text": None}]}]
    assert kinds({"prompt": blocks, "images": ["a"]}) == [["x", "IMAGE"]]
    marked = [{"role": "user", "content": [{"type": "text", "text": "a <image> b"}]}]
    assert kinds({"prompt": marked, "images": ["a"]}) == [["a ", "IMAGE", " b"]]
    assert kinds({"prompt": "no picture", "images": []}) == [["no picture"]]


@pytest.mark.parametrize("prompt, images", [
    ("<image> and <image>", ["a"]), ("<image>", []), ("<image>", ["a", "b"]),
    ([{"role": "user", "content": [{"type": "image"}]}], ["a", "b"]),
    ([{"role": "user", "content": [{"type": "text", "text": "<image>"}]}], [])])
def test_placeholder_count_must_match(prompt, images):
    """F24: never drop an image or invent one."""
    with pytest.raises(data.RowError, match=r"f:1.*image placeholders, the row has"):
        kinds({"prompt": prompt, "images": images})


@pytest.mark.parametrize("prompt", [
    3, [], [{"role": "user"}], [{"role": "User", "content": "x"}], [{"role": "chatgpt", "content": "x"}], *([{"role": "user", "content": [block]}] for block in (
        {"type": "video"}, {"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": 5}, "x"))])
def test_odd_prompts_are_refused(prompt):
    """An unknown message or block is an error of that row, not an empty prompt."""
    with pytest.raises(data.RowError, match="f:1"):
        kinds({"prompt": prompt, "images": []})


def test_an_image_needs_a_user(tmp_path):
    """Images without a place went into the system's message where no turn was the user's; `images: []` hid `image`; a split
    of a single file was ignored."""
    assert kinds({"prompt": [{"role": "human", "content": "x"}], "images": ["a"]}) == [["IMAGE", "x"]]
    with pytest.raises(data.RowError, match="f:1: images, but no user message"):
        kinds({"prompt": [{"role": "system", "content": "s"}], "images": ["a"]})
    rows = data.read_rows(write(tmp_path, {"prompt": "a", "images": [], "image": "b.png"}), ".", ())
    assert rows[0]["images"] == ["b.png"]
    with pytest.raises(data.RowError, match="rows.jsonl:test: .*rows.jsonl is a file, which has no splits"):
        data.read_rows(write(tmp_path, GOOD) + ":test", None, ())
    with pytest.raises(data.RowError, match="--eval_dataset none.jsonl: no such file"):
        data.read_rows("none.jsonl", None, (), flag="--eval_dataset")
    with pytest.raises(data.RowError, match="Extra data.*one object a line is a .jsonl file"):
        data.read_rows(write(tmp_path, GOOD, GOOD, name="lines.json"), None, ())


@pytest.mark.parametrize("family", VISION)
def test_prompt_is_what_the_processor_makes(loaded, family):
    """Ids and pixels are those of transformers' own apply_chat_template(tokenize=True), image tokens included."""
    policy, processor = loaded(family)
    row = make_row(2, 5)
    prompt = data.encode_prompt(policy, processor, row)
    messages = data.to_messages(row)
    for block, image in zip(messages[0]["content"], row["images"]):
        block["image"] = image
    theirs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                           return_tensors="pt")
    assert torch.equal(prompt.tokens, theirs["input_ids"][0])
    torch.testing.assert_close(prompt.pixels["pixel_values"], theirs["pixel_values"])
    assert data.encode_prompt(policy, processor, row).tokens.tolist() == prompt.tokens.tolist()  # F28: no mutation


@pytest.mark.parametrize("family", FAMILIES)
def test_completion_is_the_answer_and_its_eos(loaded, family):
    """T13: the ids decode to the answer exactly, then one EOS; prompt ids + completion ids are the whole's prefix."""
    policy, processor = loaded(family)
    row = make_row(int(family in VISION), 5) | {"chosen": "<think>i see 4 shapes</think><answer>4</answer>"}
    ids = data.encode_completion(policy, processor, row, "chosen")
    assert ids[-1] in policy.eos_ids and not set(ids[:-1].tolist()) & set(policy.eos_ids)
    assert processor.tokenizer.decode(ids[:-1]) == row["chosen"]
    messages = [{"role": "assistant", "content": [{"type": "text", "text": row["chosen"]}]}]
    as_messages = data.encode_completion(policy, processor, row | {"chosen": messages}, "chosen")
    assert torch.equal(ids, as_messages)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_begun_turn_is_continued(loaded, family):
    """Step-DPO: steps in a last assistant message are prompt, in the same turn and unscored; the completion is the next
    step and its EOS; prompt and completion together are the conversation as the template renders it whole."""
    policy, processor = loaded(family)
    steps, step = "<think>i see 4 shapes", "</think><answer>4</answer>"
    question = {"role": "user", "content": "how many shapes are there?"}
    row = make_row(int(family in VISION), 5) | {"prompt": [question, {"role": "assistant", "content": steps}], "chosen": step, "rejected": "</think>"}
    prompt, (ids, _) = data.encode_group(policy, processor, row, ("chosen", "rejected"))
    plain = data.encode_prompt(policy, processor, row | {"prompt": [question]})
    assert prompt.tokens[:len(plain.tokens)].tolist() == plain.tokens.tolist()  # no second turn
    assert processor.tokenizer.decode(prompt.tokens[len(plain.tokens):]) == steps
    assert processor.tokenizer.decode(ids[:-1]) == step and ids[-1] in policy.eos_ids
    whole = data.encode_completion(policy, processor, row | {"prompt": [question], "chosen": steps + step}, "chosen")
    assert [*prompt.tokens[len(plain.tokens):].tolist(), *ids.tolist()] == whole.tolist()
    assert row["prompt"][1]["content"] == steps  # the row is as it was
    with pytest.raises(data.RowError, match="row 5: the prompt's last message is the assistant's, and does not end with text"):
        data.encode_prompt(policy, processor, row | {"prompt": [question, {"role": "assistant", "content": ""}]})


@pytest.mark.parametrize("column, value, message", [
    ("chosen", "", "non-empty"), ("chosen", 4, "non-empty"), ("rejected", [{"role": "user"}], "non-empty"),
    ("chosen", [{"role": "user", "content": "x"}], "one assistant message of text"),
    ("chosen", [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "see"}]}], "message of text"),
    ("chosen", [{"role": "assistant", "content": ["x"]}], "message of text"),
    ("chosen", [{"role": "assistant", "content": [{"type": "thought", "text": "x"}]}], "message of text"),
    ("chosen", "same", "are the same"),
    ("chosen", "4<|im_end|>lost", r"chosen contains <\|im_end\|>; only the chat template"),
    ("chosen", "a <|image_pad|>", r"chosen contains <\|image_pad\|>; only"),
    ("prompt", "what is <|image_pad|>?", r"prompt contains <\|image_pad\|>; only.* is written <image>"),
    ("prompt", "x<|im_end|>\n", r"prompt contains <\|im_end\|>; only.*give bare text, or messages"),
    ("prompt", [{"role": "system", "content": "<|im_start|>system"}, {"role": "user", "content": "x"}],
     r"prompt contains <\|im_start\|>; only.*If a chat template has rendered it")])
def test_bad_pairs_are_refused(loaded, column, value, message):
    """F26: empty or equal answers, placeholder tokens in text: an error that names the row. A prompt that spelled a turn's
    end made turns of its own, without a word."""
    policy, processor = loaded("qwen2_5_vl")
    row = make_row(1, 5) | {"chosen": "good", "rejected": "same", column: value}
    with pytest.raises(data.RowError, match=f"row 5.*{message}"):
        data.encode_group(policy, processor, row, ("chosen", "rejected"))


def test_words_that_no_template_writes_are_text(loaded):
    """The check for a template's own tokens must let markup pass, and tags that a tokenizer holds as special tokens: a
    prompt may ask for them."""
    policy, processor = loaded("qwen2_5_vl")
    row = make_row(1, 5) | {"prompt": "<b>Say</b> <think>, </s> or <|box_start|>.", "chosen": "<think>a</think> <|x|>"}
    prompt, (ids,) = data.encode_group(policy, processor, row, ("chosen",))
    assert processor.tokenizer.decode(ids[:-1]) == row["chosen"] and row["prompt"] in processor.tokenizer.decode(prompt.tokens)
    processor = copy.deepcopy(processor)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]}, replace_extra_special_tokens=False)
    prompt = data.encode_prompt(policy, processor, row)
    assert processor.tokenizer.convert_tokens_to_ids("<think>") in prompt.tokens


def test_token_across_the_boundary(loaded, monkeypatch):
    """Where prompt and answer would share a token, the answer is tokenized by itself: the sampler's prompt ends there."""
    policy, processor = loaded("qwen2_5_vl")
    monkeypatch.setattr(processor, "chat_template", "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}")
    row = {"prompt": "how many shap", "images": [], "chosen": "es", "_source": "f:1", "_image_root": None}
    prompt, (ids,) = data.encode_group(policy, processor, row, ("chosen",))
    whole = processor.tokenizer("how many shapes")["input_ids"]
    assert whole[:len(prompt.tokens)] != prompt.tokens.tolist(), "the test needs a straddling token"
    assert processor.tokenizer.decode(ids[:-1]) == "es" and ids[-1] == processor.tokenizer.eos_token_id
    monkeypatch.setattr(processor, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(data.RowError, match="f:1: the chat template refused it.*roles must alternate"):
        data.encode_prompt(policy, processor, row)


def test_bos_is_written_once(loaded):
    """A tokenizer that adds a BOS behind a template that writes it, or not: one either way."""
    policy, processor = loaded("llava")
    row = make_row(1, 5) | {"chosen": "4"}
    template, bos = processor.chat_template, processor.tokenizer.bos_token_id
    try:
        for text in (template, "{{ bos_token }}" + template):
            processor.chat_template = text
            prompt, (ids,) = data.encode_group(policy, processor, row, ("chosen",))
            assert (prompt.tokens == bos).sum() == 1 and prompt.tokens[0] == bos and bos not in ids
            assert processor.tokenizer.decode(ids[:-1]) == "4"
    finally:
        processor.chat_template = template


def test_what_ends_and_what_never_comes(loaded):
    """All EOS ids of generation_config end a completion; the head's rows beyond the tokenizer are never sampled."""
    policy, processor = loaded("llava")
    size = policy.hf.get_output_embeddings().weight.shape[0]
    assert policy.eos_ids == [1, 3] and policy.pad_id == 1
    assert policy.never_sampled.tolist() == [2, *range(len(processor.tokenizer), size)] and size == len(processor.tokenizer) + 5


def test_overlong_is_refused_or_skipped_never_cut(loaded, capsys):
    """F25: lengths are counted with the images; `error` names the row, `skip` counts, and others take its place."""
    policy, processor = loaded("qwen2_5_vl")
    rows = [make_row(1 + 3 * (i == 2), i) | {"_source": f"f:{i}"} for i in range(4)]

    def size_of(row):
        return data.Size(len(data.encode_prompt(policy, processor, row).tokens), 0)

    limit = max(size_of(rows[i]).prompt for i in (0, 1, 3))
    with pytest.raises(data.RowError, match=rf"f:2: {size_of(rows[2]).prompt} tokens with the images"):
        data.check_rows(rows, 4, 0, "error", limit, 0, 1, size_of)
    plan, longest, _ = data.check_rows(rows, 8, 0, "skip", limit, 0, 1, size_of)
    assert len(plan) == 8 and set(plan) == {0, 1, 3}
    assert "1 skipped as longer than" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no row is left"):
        data.check_rows(rows, 4, 0, "skip", 3, 0, 1, size_of)
    assert data.length_limit(policy, 10**9) == policy.hf.config.text_config.max_position_embeddings


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_in_order(workers):
    """Results in order though they are ready in another one; an error at its item's place, after what stands before it; no
    more than `ahead` are begun, and none after the last one asked for; no thread is left."""
    begun, threads = [], threading.active_count()

    def work(i):
        begun.append(i)
        time.sleep(0.01 * (i % 3 == 0))
        if i == 7:
            raise data.RowError("f:7: bad")
        return i * i

    found = data.in_order(work, iter(range(9)), workers, 3)
    for i in range(7):
        assert next(found) == i * i and len(begun) <= i + 1 + 3 * bool(workers)
    with pytest.raises(data.RowError, match="f:7: bad"):
        next(found)
    begun.clear()
    found = data.in_order(work, itertools.cycle([1, 2, 3]), workers, 50)
    assert [next(found), next(found)] == [1, 4]
    found.close()
    size = len(begun)
    time.sleep(0.05)
    assert len(begun) <= size + workers and len(begun) < 50
    assert list(data.in_order(work, [], workers)) == [] and list(data.in_order(work, range(5), workers)) == [0, 1, 4, 9, 16]
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_plan_covers_each_row_once_an_epoch():
    """P21: every epoch is a permutation, a longer plan begins with a shorter one (resume at any cut), seeds differ."""
    plan = data.Plan([7], 24, seed=3)
    for epoch in range(3):
        assert sorted(plan[7 * epoch:7 * epoch + 7]) == list(range(7))
    assert plan[:7] != plan[7:14]
    assert data.Plan([7], 10, seed=3)[:] == plan[:10] and data.Plan([7], 24, seed=4)[:] != plan[:]
    kept = data.Plan([7], 10, seed=3, dropped={2, 5})
    assert Counter(kept) == Counter([0, 1, 3, 4, 6] * 2)


def test_plan_by_a_column():
    """Curry-DPO: each epoch goes by the column, equal ones in an order of the seed's; skipped rows leave no gap."""
    keys = [3, 1, 2, 1, 1.5, 1, -4]
    plan = data.Plan([7], 14, seed=3, keys=keys)
    for epoch in (plan[:7], plan[7:]):
        assert sorted(epoch) == list(range(7)) and [keys[i] for i in epoch] == sorted(keys)
    orders = {tuple(data.Plan([7], 7, seed=seed, keys=keys)) for seed in range(20)}
    assert len(orders) == 6  # three rows of the same key
    assert Counter(data.Plan([7], 10, seed=3, dropped={2, 5}, keys=keys)) == Counter([0, 1, 3, 4, 6] * 2)


def eager_plan(num_rows, num_draws, seed, dropped, keys):
    """The order of draws as a list, written out."""
    plan, epoch = [], 0
    while len(plan) < num_draws:
        order = np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
        if keys is not None:
            order.sort(key=keys.__getitem__)
        plan += [i for i in order if i not in dropped][:num_draws - len(plan)]
        epoch += 1
    return plan


def eager_mixture(sizes, shares, num_draws, seed, dropped, keys):
    """The same of a mixture: each draw from the dataset furthest below its share."""
    share, count, order = np.array(shares) / sum(shares), np.zeros(len(sizes)), []
    for n in range(num_draws):
        order.append(int(np.argmax(share * (n + 1) - count)))
        count[order[-1]] += 1
    plans, start = [], 0
    for j, size in enumerate(sizes):
        gone = {i - start for i in dropped if start <= i < start + size}
        plans.append(iter([start + i for i in eager_plan(size, int(count[j]), seed + j, gone, keys and keys[start:start + size])]))
        start += size
    return [next(plans[j]) for j in order]


@pytest.mark.parametrize("dropped", [set(), {0, 5, 13}])
@pytest.mark.parametrize("keys", [None, [i % 3 for i in range(20)]])
def test_plan_is_the_written_out_order(monkeypatch, dropped, keys):
    """Draws that are computed when they are asked for, in any order, must be those of the list that a run once held."""
    monkeypatch.setattr(data.Plan, "BLOCK", 7)
    for draws in (0, 5, 20, 64):
        one, mixed = eager_plan(20, draws, 3, dropped, keys), eager_mixture([6, 4, 10], [0.3, 1, 0.7], draws, 3, dropped, keys)
        for plan, expected in ((data.Plan([6, 4, 10], draws, 3, dropped, keys), one),
                               (data.Plan([6, 4, 10], draws, 3, dropped, keys, [0.3, 1, 0.7]), mixed)):
            assert list(plan) == expected == plan[:] and plan.rows() == sorted(set(expected))
            assert [plan[i] for i in reversed(range(draws))] == expected[::-1]
    with pytest.raises(model.InputError, match="no row is left"):
        data.Plan([2, 18], 5, 3, {0, 1}, shares=[1, 9])


def test_a_long_plan_is_small():
    """The plan of a million steps was a list of every draw, 1.16 GB on each rank."""
    tracemalloc.start()
    plan = data.Plan([1000], 32_000_000, 3)
    assert len(plan) == 32_000_000 and plan.rows() == list(range(1000))
    assert sorted(plan[i] for i in range(31_999_000, 32_000_000)) == list(range(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_shapes_task():
    """The picture holds as many shapes as the solution says (counted by colour regions per cell); splits differ."""
    for row in data.shapes_rows(50, 0, "train"):
        image = row["images"][0]
        cells = [image.crop((16 * c, 16 * r, 16 * c + 16, 16 * r + 16)) for r in range(3) for c in range(3)]
        drawn = sum(len(cell.getcolors()) > 1 for cell in cells)
        assert str(drawn) == row["solution"] and f">{drawn}<" in row["chosen"] and f">{drawn}<" not in row["rejected"]
    a, b = data.shapes_rows(3, 0, "train"), data.shapes_rows(3, 0, "train")
    assert [x["images"][0].tobytes() for x in a] == [x["images"][0].tobytes() for x in b]
    assert a[0]["images"][0].tobytes() != data.shapes_rows(1, 0, "test")[0]["images"][0].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("families", [["qwen2_5_vl"], FAMILIES], ids=["default", "all"])
def test_export_round_trip(loaded, folders, families, tmp_path):
    """F18: every tensor, the processor, the chat template and files the processor does not know come back in a clean
    process; weights through transformers alone, and the processor too where it needs no torchvision."""
    import sys

    from conftest import run

    for family in families:
        policy, processor = loaded(family)
        with torch.no_grad():
            kept = [p.clone() for p in policy.parameters()]
            for i, p in enumerate(policy.parameters()):
                p += 0.001 * (i + 1)
        try:
            model.export(policy, tmp_path / family)
            torch.save(policy.hf.state_dict(), tmp_path / f"{family}.pt")
        finally:
            with torch.no_grad():
                for p, value in zip(policy.parameters(), kept):
                    p.copy_(value)
        assert {f.name for f in folders[family].iterdir()} == {f.name for f in (tmp_path / family).iterdir()}
    check = '''
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, AutoProcessor
sys.path.insert(0, sys.argv[1])
import model
for family in sys.argv[2].split():
    text_only = family in sys.argv[3]
    auto = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    hf, info = auto.from_pretrained(family, output_loading_info=True)
    assert not any(info.values()), info
    expected = torch.load(f"{family}.pt", weights_only=True)
    state = hf.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in state)
    assert hf.dtype == torch.float32
    video = ("Qwen", "Onevision", "InternVL")  # whose AutoProcessor wants torchvision
    processor = (AutoTokenizer.from_pretrained if text_only else model.load_processor
                 if any(name in type(hf).__name__ for name in video) else AutoProcessor.from_pretrained)(family)
    content = "hi" if text_only else [{"type": "image"}, {"type": "text", "text": "hi"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)
    assert "hi" in text and "assistant" in text.lower(), text
'''
    run(sys.executable, "-c", check, os.path.dirname(model.__file__), " ".join(families), " ".join(TEXT_ONLY), cwd=tmp_path)


def test_bf16_export_is_bf16_and_tied_weights_stay_one(folders, tmp_path):
    """Casting tensor by tensor would write tied weights twice; every dtype in the config says bfloat16."""
    from safetensors import safe_open

    policy, processor = model.load_policy(str(folders["qwen2_5_vl"]), "bfloat16")
    model.export(policy, tmp_path / "final")
    names = []
    for folder in (folders["qwen2_5_vl"], tmp_path / "final"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            names.append(set(file.keys()))
            dtypes = {file.get_tensor(name).dtype for name in file.keys()}
    assert names[0] == names[1] and dtypes == {torch.bfloat16}
    assert "float32" not in (tmp_path / "final" / "config.json").read_text()
    assert model.load_policy(str(tmp_path / "final"))[0].hf.dtype == torch.float32  # weights are held in fp32


def test_wrong_model_paths_are_one_error(tmp_path):
    """A folder that is not there is not looked up on the hub; a model that neither sees nor writes says so."""
    from transformers import ViTConfig

    with pytest.raises(model.InputError, match="the model ./nowhere: no such folder"):
        model.load_policy("./nowhere")
    with pytest.raises(model.InputError, match="the model runs/nowhere: no such folder, and the hub"):
        model.load_policy("runs/nowhere")
    ViTConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1).save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(model.InputError, match="vit is neither a vision-language nor a language model"):
        model.load_policy(str(tmp_path))
