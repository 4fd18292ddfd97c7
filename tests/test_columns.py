"""Which column is which: solutions, images that nothing reads, system turns, --columns. What was wrong without a word."""

import base64
import json

import pytest
from test_datasets import BYTES, root, write_jsonl, write_parquet  # noqa: F401 (fixture)
from test_runs import SCRIPTS, launch, task  # noqa: F401 (fixtures)

import data
from rewards import answers, boxes

ROW = {"question": "how many?", "image": "good.png"}


def read(root, *rows, golds=False, need=("prompt",), **settings):  # noqa: F811
    found = data.read_rows(str(write_jsonl(root / "rows.jsonl", rows)), str(root), need, **settings)
    found.golds = golds
    return found


@pytest.mark.parametrize("row, message", [
    (dict(answer="3", solution="Count the dots."), "columns solution and answer both hold a solution, and differ"),
    (dict(answer="3", reward_model={"ground_truth": "4"}), "columns answer and reward_model both hold a solution"),
    (dict(solution=1, ground_truth="B"), "--columns solution=ground_truth takes one")])
def test_two_solutions_that_differ_are_an_error(root, row, message):  # noqa: F811
    """ScienceQA: `solution` is an explanation and hid `answer`; every right answer scored 0, with exit code 0."""
    with pytest.raises(data.RowError, match=message):
        read(root, ROW | row, golds=True)[0]
    assert read(root, ROW | row)[0]["solution"] is not None, "nothing uses it here"
    name = list(row)[0]
    if name != "answer":
        assert read(root, ROW | row, golds=True, renamed={"solution": name})[0]["solution"] == row[name]


def test_two_solutions_that_agree(root):  # noqa: F811
    """The same answer in tags and bare is no contradiction; the one without a value is not there."""
    assert read(root, ROW | dict(solution="<answer> 3 </answer>", answer="3"), golds=True)[0]["solution"] == "<answer> 3 </answer>"
    assert read(root, ROW | dict(solution=None, answer="3"), golds=True)[0]["solution"] == "3"
    row = read(root, ROW | dict(solution="so", answer=""), renamed={"solution": "answer"})[0]
    assert "solution" not in row, "a column that the row does not have must not be another's"


def test_a_file_whose_solutions_are_in_different_columns(launch, task, tmp_path, capsys):  # noqa: F811
    """MathVision: `solution` is a worked solution where it is not null, else `answer` was read: golds of two kinds in one
    file. With --columns it runs, and the column and a solution are printed, and are in completions/."""
    rows = [json.loads(line) for line in open(task / "pairs.jsonl")]
    for i, row in enumerate(rows):
        row["answer"] = row.pop("solution")
        row["solution"] = "It has dots." if i == 7 else None
    file = write_jsonl(tmp_path / "mixed.jsonl", rows)
    command = ["--dataset", file, "--max_steps", 1, "--num_generations", 4, "--per_device_train_batch_size", 48,
               "--max_completion_length", 4]
    rows[7]["answer"] = None
    mixed = write_jsonl(tmp_path / "mixed2.jsonl", rows)
    with pytest.raises(data.RowError, match="mixed2.jsonl: the solution is in the column answer or solution.*jsonl:1 and .*jsonl:8"):
        launch("train_grpo", *command, "--dataset", mixed)
    with pytest.raises(data.RowError, match="mixed.jsonl:8: the columns solution and answer"):
        launch("train_grpo", *command)
    capsys.readouterr()
    launch("train_grpo", *command, "--columns", "solution=answer")
    printed = capsys.readouterr().out
    assert f"data: solutions are from the column answer, as in {file}:1: '{rows[0]['answer']}'" in printed
    line = json.loads(open(next(tmp_path.glob("run*/completions/step_1.jsonl"))).readline())
    assert line["columns"]["solution"] == line["columns"]["answer"] != "It has dots."


@pytest.mark.parametrize("solution, right, wrong", [
    (["B", "yes"], ["B", "Yes"], ["no"]), ([3, "three"], ["3", "three"], ["4"]), ([2.5], ["2.5"], ["2"])])
def test_a_list_of_solutions_accepts_any(solution, right, wrong):
    """A list was compared as the text of a list: no answer was ever right."""
    for text, expected in [(t, 1.0) for t in right] + [(t, 0.0) for t in wrong]:
        assert answers.accuracy([f"<answer>{text}</answer>"], [solution]) == [expected]
    assert answers.numeric(["<answer>3</answer>"], [["4", "3"]]) == answers.counting(["3"], [["2", "three"]]) == [1.0]
    assert boxes.iou(["[0, 0, 2, 2]"] * 3, [[0, 0, 2, 2], [[5, 5, 6, 6], [0, 0, 2, 2]], ["[0,0,2,2]", "[0,0,2,1]"]]) == [1.0] * 3


@pytest.mark.parametrize("solution", [{"value": "3"}, True, [], [True], [None], [["3"]], float("nan"), [""], [{"role": "x"}]])
def test_what_no_answer_can_equal_is_an_error(solution):
    """Dicts, booleans and nan were accepted as solutions and never matched."""
    for reward in (answers.accuracy, answers.numeric, answers.choice):
        with pytest.raises(ValueError, match="expected a text, a number or a list of them"):
            reward(["3"], [solution])


@pytest.mark.parametrize("column, value", [
    ("img_path", "good.png"), ("image_urls", ["https://x.org/a.png"]), ("videos", ["a.mp4"]), ("path", "a.png"), ("audios", ["a.wav"]),
    ("picture", {"bytes": None, "path": "a.png"}), ("scan", "data:image/png;base64,AAAA"), ("frame_path", "a b/c.jpg")])
def test_images_that_nothing_reads(root, column, value):  # noqa: F811
    """A row whose picture is in a column of another name was trained without it, with exit code 0."""
    row = {"prompt": "how many?", "answer": "3", column: value}
    if column != "frame_path":
        with pytest.raises(data.RowError, match=f"rows.jsonl:1: nothing reads the column {column}, .*--columns images={column}"):
            read(root, row)[0]
    else:
        assert read(root, row)[0]["images"] == [], "words with a space are text, in a column of no such name"
    named = read(root, row, renamed={"images": column})[0]
    assert named["images"] == (value if isinstance(value, list) else [value])
    assert read(root, row | {"image": "good.png"})[0]["_unread"] == ([column] if column != "frame_path" else [])


def test_columns_of_images_in_parquet_are_not_skipped_unread(root):  # noqa: F811
    """Of parquet the columns that nothing uses are not read: so pictures under another name were passed over unseen."""
    pytest.importorskip("pyarrow")
    for column in ("scan", "img_path"):
        path = write_parquet(root / f"{column}.parquet", [dict(prompt="what?", answer="3", note="x", **{column: (
            BYTES if column == "scan" else "a.png")})])
        with pytest.raises(data.RowError, match=f"nothing reads the column {column}"):
            data.read_rows(str(path), None, ("prompt",), columns={"prompt", "answer"})[0]


def test_images_of_clear_names_are_read(root):  # noqa: F811
    """image_path, imagefolder's file_name, image_1 and so on were passed over."""
    def images(**row):
        return read(root, {"prompt": "which?"} | row)[0]["images"]

    assert images(image_path="good.png") == images(file_name="good.png") == ["good.png"]
    assert images(image_1="a.png", image_2="b.png", image_3=None) == ["a.png", "b.png"]
    row = read(root, {"prompt": "<image 2> or <image 1>?", "image_1": "a.png", "image_2": "b.png"})[0]
    assert (row["prompt"], row["images"]) == ("<image> or <image>?", ["b.png", "a.png"])
    row = read(root, {"prompt": "<image1> and <image2>?", "image": "both.png"})[0]
    assert row["prompt"] == "<image1> and <image2>?", "one picture holds both: the numbers are text"


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_what_a_run_says_of_images_and_systems(launch, task, tmp_path, capsys, name):  # noqa: F811
    """A model that sees and gets no picture says so; a second column of pictures is one warning; --system_prompt is read
    by the model, where the row has no system turn of its own."""
    rows = [json.loads(line) for line in open(task / "pairs.jsonl")]
    for row in rows:
        row |= {"image_path": "x.png"} if row.get("images") else {}
    rows[0]["system"] = "of the row"
    few = ["--max_steps", 1, "--per_device_train_batch_size", 12, *(["--num_generations", 2, "--max_completion_length", 4]
                                                                    if name == "train_grpo" else [])]
    launch(name, *few, "--dataset", write_jsonl(tmp_path / "beside.jsonl", rows), "--system_prompt", "be brief")
    out, err = capsys.readouterr()
    assert err.count("nothing reads the column image_path") == 1 and "no row has an image" not in err
    assert ("be brief" in out) != ("of the row" in out) and "<|im_start|>system" in out.replace("\\n", "\n")
    bare = [dict(prompt="how many?", **{k: row[k] for k in ("solution", "chosen", "rejected")}) for row in rows]
    launch(name, *few, "--dataset", write_jsonl(tmp_path / "bare.jsonl", bare))
    assert "no row has an image, and this is a model that sees" in capsys.readouterr().err


def test_system_turns(root):  # noqa: F811
    """A `system` column was passed over. It is the first turn; a prompt that has another is an error."""
    def roles(row, **settings):
        return [(m["role"], m["content"][-1]["text"]) for m in data.to_messages(read(root, row, **settings)[0])]

    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]
    assert roles({"system": "think", "conversations": turns}) == [("system", "think"), ("user", "what?")]
    assert roles({"prompt": "what?"}, system="be brief")[0] == ("system", "be brief")
    assert roles({"prompt": "what?", "system": "think"}, system="be brief")[0] == ("system", "think")
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "what?"}]
    assert roles({"prompt": own}, system="be brief")[0] == ("system", "mine")
    with pytest.raises(data.RowError, match="two system turns, and differ"):
        roles({"prompt": own, "system": "think"})
    with pytest.raises(data.RowError, match="the system turn must be a string, got list"):
        roles({"prompt": "what?", "system": ["think"]})


def test_the_last_answer_in_text_blocks(root, loaded):  # noqa: F811
    """TRL's and Hugging Face's usual rows for SFT: the assistant's turn is a list of text blocks. It was refused, and as a
    solution it was a list that no answer equals."""
    blocks = [{"type": "text", "text": "a "}, {"type": "text", "text": "cat", "image": None}]
    row = read(root, {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}]},
                                   {"role": "assistant", "content": blocks}]})[0]
    assert row["chosen"] == row["solution"] == "a cat"
    ids = data.encode_completion(*loaded("qwen2_5_vl"), row, "chosen")
    assert loaded("qwen2_5_vl")[1].tokenizer.decode(ids[:-1]) == "a cat"


@pytest.mark.parametrize("flags, message", [
    (["--columns", "solution"], "expected NAME=COLUMN"), (["--columns", "gold=answer"], "NAME one of prompt, images"),
    (["--system_prompt", "none.txt"], "--system_prompt none.txt: no such file")])
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_wrong_flags(name, flags, message, capsys):
    """A typo in --columns would read no column at all; a missing file would be the system turn itself."""
    with pytest.raises(SystemExit):
        SCRIPTS[name].parse_args(flags)
    assert message in capsys.readouterr().err


def test_images_in_blocks(root):  # noqa: F811
    """What an image block holds was dropped: rows without `images` were refused, and where `images` had another order the
    pictures changed places, with exit code 0. Pixels do not reach the columns that rewards and completions/ get."""
    code = base64.b64encode(BYTES["bytes"]).decode()
    uri = f"data:image/png;base64,{code}"

    def content(*images):
        return [{"role": "user", "content": [*images, {"type": "text", "text": "what?"}]}]

    blocks = [{"type": "image", "image": "good.png"}, {"type": "image_url", "image_url": {"url": uri}}, {"type": "image", "image": code},
              {"type": "image", "image": f"file://{root}/good.png", "max_pixels": 9}, {"type": "image", "path": "good.png"}]
    turns = [*content(*blocks), {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]
    for row in (dict(prompt=content(*blocks)), dict(messages=turns), dict(message=turns)):
        row = read(root, row)[0]
        assert [data.load_image(x, row).getpixel((0, 0)) for x in row["images"]] == [(0, 0, 255), *[(255, 0, 0)] * 2, *[(0, 0, 255)] * 2]
        assert sum(block["type"] == "image" for block in data.to_messages(row)[0]["content"]) == 5
        assert code not in str({name: x for name, x in row.items() if name != "images"})
    same = read(root, dict(prompt=content(blocks[0]), images=["good.png"]))[0]
    assert same["images"] == ["good.png"]
    for images, found in ((["b.png", "good.png"], blocks[:2]), ([], [blocks[0], {"type": "image"}])):
        with pytest.raises(data.RowError, match="rows.jsonl:1: the image blocks of its messages and its images do not say the same"):
            read(root, dict(prompt=content(*found), images=images))[0]


@pytest.mark.parametrize("image, message", [("data:image/png;base64,AAAA", "image of 3 bytes cannot be read"),
                                            ("data:image/png;base64,A*", "no base64"), ("x" * 9000, "image of 9000 characters"),
                                            ("file:///etc/hostname", "outside --image_root")])
def test_encoded_images_that_are_none(root, image, message):  # noqa: F811
    """A payload must not be printed, and a path in file:// must not leave the root."""
    with pytest.raises(data.RowError, match=message) as error:
        data.load_image(image, {"_source": "f:1", "_image_root": str(root)})
    assert len(str(error.value)) < 300


def test_preferences_as_conversations(root):  # noqa: F811
    """Whole conversations, one message as an object, and ms-swift's rejected_response were refused; roles other than the
    assistant's and conversations that begin differently still are."""
    user, cat, dog = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}, {"role": "assistant", "content": "a dog"}
    for row in (dict(chosen=[user, cat], rejected=[user, dog]), dict(prompt="what?", chosen=[user, cat], rejected=[user, dog]),
                dict(prompt="what?", chosen=cat, rejected=dog), dict(messages=[user, cat], rejected_response="a dog"),
                dict(query="what?", response="a cat", rejected_response="a dog")):
        row = read(root, row, need=("prompt", "chosen", "rejected"))[0]
        assert [block["text"] for m in data.to_messages(row) for block in m["content"]] == ["what?"]
        assert (data.answer_text(row, "chosen"), data.answer_text(row, "rejected")) == ("a cat", "a dog")
    for row, message in ((dict(chosen=[user, cat], rejected=[cat, dog]), "begin differently"),
                         (dict(prompt="why?", chosen=[user, cat], rejected=[user, dog]), "begin differently"),
                         (dict(query="what?", response="a cat", history=[["hi", "hello"]]), "nothing reads the column history")):
        with pytest.raises(data.RowError, match=message):
            read(root, row)[0]
    row = read(root, dict(prompt="what?", chosen=[cat], rejected=[user]))[0]
    with pytest.raises(data.RowError, match="rejected must be"):
        data.answer_text(row, "rejected")


def test_a_column_that_no_row_has(launch, task):  # noqa: F811
    """--columns with a name that stands in no row was passed over where the column is not needed: exit code 0, and no
    eval/accuracy."""
    with pytest.raises(data.RowError, match="--columns solution=nosuch: no row of --dataset has a column nosuch"):
        launch("train_dpo", "--algo", "mpo", "--columns", "solution=nosuch", "--max_steps", 1)
