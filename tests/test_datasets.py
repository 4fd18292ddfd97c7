"""Published datasets, in tiny files of their exact schemas: what a row becomes, folders and splits, mixtures, memory."""

import base64
import hashlib
import io
import json
import random
import re
import sys
import time
from argparse import Namespace
from collections import Counter, OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import ROOT, InProcess, run, script
from PIL import Image
from test_runs import SCRIPTS, launch, task  # noqa: F401 (fixtures)

import data
import model
import rollout


def png(color="red", size=(48, 32)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows, group=2):
    """As the hub's: image columns are struct<bytes: binary, path: string>, or lists of it, with missing fields null."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    arrays = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        kind = {"image": image, "decoded_image": image, "images": pa.list_(image)}.get(name)
        arrays[name] = pa.array(values, None if isinstance(values[0], str) else kind)
    pq.write_table(pa.table(arrays), path, row_group_size=group)
    return path


def said(role, text, image=False):
    """A message as datasets stores it in a struct column: the image block has a null text."""
    return {"role": role, "content": [*([{"type": "image", "text": None}] if image else []), {"type": "text", "text": text}]}


BYTES, REFERENCE = {"bytes": png(), "path": "a.png"}, {"bytes": None, "path": "good.png"}
# name: (writer, file, rows, what the first row must give: prompt's text around its images, images, solution, chosen, rejected)
SCHEMAS = {
    "HuggingFaceH4/rlaif-v_formatted, trl-lib/rlaif-v": (
        write_parquet, "data/train-00000-of-00001.parquet",
        [dict(prompt=[said("user", "what?", True)], chosen=[said("assistant", "a cat")], rejected=[said("assistant", "a dog")],
              images=[BYTES])] * 3,
        (["IMAGE", "what?"], 1, None, "a cat", "a dog")),
    "openbmb/RLAIF-V-Dataset": (
        write_parquet, "RLAIF-V-Dataset_000.parquet",
        [dict(ds_name="RLAIF-V", image=BYTES, question="what?", chosen="a cat", rejected="a dog", origin_dataset="COCO",
              origin_split='{"model": "x"}', idx="0", image_path="0.png")] * 3,
        (["IMAGE", "what?"], 1, None, "a cat", "a dog")),
    "lmms-lab/multimodal-open-r1-8k-verified": (
        write_parquet, "data/train-00000-of-00001.parquet",
        [dict(image=BYTES, problem="what?", solution="<think>so</think>\n\n<answer>B</answer>", original_question="q",
              original_answer="B")],
        (["IMAGE", "what?"], 1, "<think>so</think>\n\n<answer>B</answer>", None, None)),
    "leonardPKU/clevr_cogen_a_train, GEOQA_R1V_Train_8K": (
        write_parquet, "data/train-00000-of-00001.parquet",
        [dict(image=BYTES, problem="how many?", solution="<answer> 3 </answer>")],
        (["IMAGE", "how many?"], 1, "<answer> 3 </answer>", None, None)),
    "hiyouga/geometry3k": (
        write_parquet, "data/train-00000-of-00001.parquet",
        [dict(images=[BYTES, REFERENCE], problem="<image><image>Find x.", answer="3", id="0", choices=["1", "3"],
              ground_truth="B")],
        (["IMAGE", "IMAGE", "Find x."], 2, "3", None, None)),
    "AI4Math/MathVista": (
        write_parquet, "data/train-00000-of-00001.parquet",
        [dict(pid="1", question="Is it?", image="images/1.jpg", decoded_image=BYTES, choices=["yes", "no"], unit=None,
              precision=None, answer="yes", question_type="multi_choice", answer_type="text",
              metadata=dict(category="general-vqa", skills=["arithmetic"], img_height=32), query="Question: Is it?\nChoices: ...")],
        (["IMAGE", "Question: Is it?\nChoices: ..."], 1, "yes", None, None)),
    "verl": (
        write_parquet, "train.parquet",
        [dict(data_source="hiyouga/geometry3k", prompt=[{"role": "user", "content": "<image>Find x."}], images=[BYTES],
              ability="math", reward_model={"style": "rule", "ground_truth": "3"}, extra_info={"split": "train", "index": 0})],
        (["IMAGE", "Find x."], 1, "3", None, None)),
    "LLaVA": (
        lambda path, rows: path.write_text(json.dumps(rows)) and path, "train.json",
        [dict(id="0", image="good.png", conversations=[
            {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}, {"from": "human", "value": "where?"},
            {"from": "gpt", "value": "there"}])],
        (["IMAGE", "\nwhat?", "a cat", "where?"], 1, "there", "there", None)),
    "ShareGPT, preferences": (
        write_jsonl, "train.jsonl",
        [dict(conversations=[{"from": "system", "value": "be brief"}, {"from": "human", "value": "<image>what?"}], images=["good.png"],
              chosen={"from": "gpt", "value": "a cat"}, rejected={"from": "gpt", "value": "a dog"})],
        (["be brief", "IMAGE", "what?"], 1, None, "a cat", "a dog")),
    "OpenAI messages": (
        write_jsonl, "train.jsonl",
        [dict(messages=[{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a cat"}], images=["good.png"])],
        (["IMAGE", "what?"], 1, "a cat", "a cat", None)),
    "VLM-R1": (
        write_jsonl, "train.jsonl",
        [dict(id=1, image=["good.png", "good.png"], conversations=[{"from": "human", "value": "<image><image>where?"},
                                                                   {"from": "gpt", "value": "[1, 2, 3, 4]"}],
              accu_reward_method="iou")],
        (["IMAGE", "IMAGE", "where?"], 2, "[1, 2, 3, 4]", "[1, 2, 3, 4]", None)),
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "good.png").write_bytes(png("blue"))
    return tmp_path


@pytest.mark.parametrize("name", SCHEMAS)
def test_published_schemas(root, loaded, name):
    """Each becomes a prompt with its pictures where they belong, and what it is scored against; it encodes."""
    write, file, rows, (texts, images, solution, chosen, rejected) = SCHEMAS[name]
    path = write(root / "set" / file if file.startswith("data") else root / file, rows)
    row = data.read_rows(str(root / "set" if file.startswith("data") else path), str(root), ("prompt",))[0]
    assert [b.get("text", "IMAGE") for m in data.to_messages(row) for b in m["content"]] == texts
    assert len(row["images"]) == images and data.load_image(row["images"][0], row).mode == "RGB"
    assert row.get("solution") == solution
    policy, processor = loaded("qwen2_5_vl")
    data.encode_prompt(policy, processor, row)
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        assert text is None and column not in row or \
            processor.tokenizer.decode(data.encode_completion(policy, processor, row, column)[:-1]) == text
    sent = {k: v for k, v in row.items() if k != "images"}
    assert b"PNG" not in repr(sent).encode(), "pixels stand in a row once: reward functions are sent the other columns"


def test_mmpr(root, loaded):
    """OpenGVLab/MMPR: meta.json names annotation files and their image folders; repeat_time is a share of the draws."""
    write_jsonl(root / "secret.jsonl", [dict(question="not of this dataset")])
    root = root / "sets"
    (root / "MMPR" / "images" / "a").mkdir(parents=True)
    (root / "MMPR" / "images" / "a" / "0.png").write_bytes(png())
    rows = [dict(image="0.png", question="what?", chosen="a cat", rejected="a dog", answer_gt="cat"),
            dict(image=["0.png", "0.png"], question="<image>\n<image>\nwhich?", chosen="1", rejected="2")]
    write_jsonl(root / "MMPR" / "annotations" / "a.jsonl", rows)
    write_jsonl(root / "MMPR" / "annotations" / "b.jsonl", [dict(question="no picture?", chosen="1", rejected="2")] * 4)
    meta = {"a": dict(root="MMPR/images/a", annotation="MMPR/annotations/a.jsonl", data_augment=False, repeat_time=3, length=2),
            "b": dict(root="", annotation="MMPR/annotations/b.jsonl", data_augment=False, repeat_time=1, length=4)}
    (root / "MMPR" / "meta.json").write_text(json.dumps(meta))
    found = data.read_rows(str(root / "MMPR" / "meta.json"), str(root), ("prompt", "chosen", "rejected"))
    assert len(found) == 6 and found.sizes == [2, 4] and found.shares == [6, 4]
    assert found[0]["images"] == ["MMPR/images/a/0.png"] and found[0]["solution"] == "cat" and found[2]["images"] == []
    assert data.load_image(found[1]["images"][1], found[1]).size == (48, 32)
    data.encode_group(*loaded("qwen2_5_vl"), found[1], ("chosen", "rejected"))
    plan = data.Plan(found.sizes, 50, 0, shares=found.shares)
    assert sum(i < 2 for i in plan) == 30
    for entry, message in ((dict(annotation="../../secret.jsonl"), "no annotation"), (dict(root="x"), "expected a list of objects")):
        (root / "MMPR" / "meta.json").write_text(json.dumps({"a": entry}))
        with pytest.raises(data.RowError, match=message):
            data.read_rows(str(root / "MMPR" / "meta.json"), str(root), ())
    for repeat in (0, -1, "2", None, True):
        (root / "MMPR" / "meta.json").write_text(json.dumps({"a": meta["a"] | dict(repeat_time=repeat)}))
        with pytest.raises(data.RowError, match="a: repeat_time must be a number above 0"):
            data.read_rows(str(root / "MMPR" / "meta.json"), str(root), ())
    outside = meta | {"a": meta["a"] | dict(root="../..")}
    (root / "MMPR" / "meta.json").write_text(json.dumps(outside))
    row = data.read_rows(str(root / "MMPR" / "meta.json"), str(root), ())[0]
    with pytest.raises(data.RowError, match="outside --image_root"):
        data.load_image(row["images"][0], row)


def test_folders_and_splits(root):
    """The shards of a split, in order; what is no row file is not read; where names decide nothing, an error lists them."""
    rows = [dict(prompt=str(i)) for i in range(9)]
    for i in range(3):
        write_jsonl(root / "set" / "data" / f"train-{i}-of-3.jsonl", rows[2 * i:2 * i + 2])
    write_jsonl(root / "set" / "data" / "test-0-of-1.jsonl", rows[6:7])
    write_jsonl(root / "set" / "data" / "testmini-0-of-1.jsonl", rows[7:9])
    (root / "set" / "dataset_infos.json").write_text("{}")

    def prompts(name, split="train"):
        return "".join(row["prompt"] for row in data.read_rows(str(root / name), None, ("prompt",), split))

    assert prompts("set") == "012345" and prompts("set", "test") == "6" and prompts("set:testmini") == "78"
    assert prompts("set/data/train-1-of-3.jsonl") == "23"
    with pytest.raises(data.RowError, match="0 files named after 'val', expected some, .*set:SPLIT.* of: data/test-0-of-1.jsonl"):
        prompts("set:val")
    write_jsonl(root / "plain" / "a.jsonl", rows[:2])
    write_jsonl(root / "plain" / "b.jsonl", rows[2:3])
    assert prompts("plain") == prompts("plain", "test") == "012"
    write_jsonl(root / "two" / "math" / "train.jsonl", rows[:1])
    write_jsonl(root / "two" / "code" / "train.jsonl", rows[1:2])
    with pytest.raises(data.RowError, match="2 files named after 'train', expected some, in one folder"):
        prompts("two")
    assert prompts("two:math/train") == "0"
    (root / "empty").mkdir()
    with pytest.raises(data.RowError, match="of: no files"):
        prompts("empty")
    with pytest.raises(data.RowError, match="--dataset owner/name: no such file or folder, and the hub cannot give"):
        data.read_rows("owner/name", None, ())


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as its client asks for. repos: {"owner/name" or "datasets/owner/name": folder}; pushed: {path: bytes}."""

    protocol_version, commit, repos, pushed, asked = "HTTP/1.1", "c" * 40, {}, {}, []

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def do_GET(self):
        self.asked.append(self.path.split("?")[0])
        kind, name, what, where = re.fullmatch(r"/(?:api/)?(models/|datasets/)?(me/\w+)(?:/(revision|tree|resolve)/\w+)?/?(.*)"
                                               r"|.*", self.asked[-1]).groups()
        folder = self.repos.get((kind or "").removeprefix("models/") + (name or ""))
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()] if folder else []
        if what == "tree" and folder:
            return self.answer([dict(type="file", path=file, size=1, oid="a" * 40) for file in files if file.startswith(where)])
        if what == "resolve" and where in files:
            content = (folder / where).read_bytes()
            return self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
        if what != "resolve" and folder:
            return self.answer(dict(id=name, sha=self.commit, siblings=[dict(rfilename=file) for file in files]))
        self.answer(b"", 404, X_Error_Code="EntryNotFound" if folder else "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = [dict(path=file["path"], uploadMode="regular", shouldIgnore=False) for file in json.loads(sent)["files"]]
            return self.answer(dict(files=files))
        for line in map(json.loads, sent.splitlines() if "/commit/" in self.path else []):
            if line["key"] == "file":
                self.pushed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"http://{self.headers['Host']}/me/new"
        self.answer(dict(url=url, errors=[], warnings=[], commitUrl=f"{url}/commit/1", commitOid=self.commit))

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_hub_ids(root, folders):
    """The hub's own client, against a server on this machine: --dataset takes a hub id, of which row files alone are
    fetched; so does --model_name_or_path, and final/ has all of its files; --push_to_hub uploads final/ as it is."""
    write_jsonl(root / "pairs" / "data" / "train.jsonl", [dict(prompt=f"how many {i}?", chosen="3") for i in range(4)])
    (root / "pairs" / "script.py").write_text("raise SystemExit('run')")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.repos |= {"me/tiny": folders["qwen2_5_vl"], "datasets/me/pairs": root / "pairs"}
    Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(root / "home"), "HF_TOKEN": "hf_x",
           "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    try:
        output = script("train_dpo.py", "--algo", "sft", "--model_name_or_path", "me/tiny", "--dataset", "me/pairs:train",
                        "--max_steps", "1", "--per_device_train_batch_size", "2", "--push_to_hub", "me/new", "--output_dir", "r",
                        cwd=root, env=env)
    finally:
        server.shutdown()
        server.server_close()
    assert "data: 4 rows, 2 of them in this run" in output and "uploaded r/final to me/new" in output
    assert any(path.endswith("/train.jsonl") for path in Hub.asked) and not any(path.endswith(".py") for path in Hub.asked)
    final = {file.relative_to(root / "r" / "final").as_posix(): file.read_bytes() for file in (root / "r" / "final").rglob("*")}
    assert {file.name for file in folders["qwen2_5_vl"].iterdir()} | {"README.md"} == final.keys() and Hub.pushed == final
    assert (root / "r" / "final" / "tokenizer.json").read_bytes() == (folders["qwen2_5_vl"] / "tokenizer.json").read_bytes()


def test_parquet_faults(root, monkeypatch):
    """A cut file and a missing pyarrow are one error; a row names its file and number; an image's bytes are checked as
    a file's are."""
    path = write_parquet(root / "a.parquet", [dict(prompt=f"{i}", image=BYTES) for i in range(7)], group=3)
    rows = data.read_rows(str(path), None, ("prompt",))
    assert [row["prompt"] for row in rows] == list("0123456") and rows[5]["_source"] == f"{path}[5]"
    assert [rows[i]["prompt"] for i in (6, 0, 3, 2)] == list("6032") and "image" not in rows[0]
    for image, message in ((b"<html>", "image of 6 bytes cannot be read"), ({"bytes": None, "path": None}, "must be a path"),
                           ({"bytes": None, "path": "../x.png"}, "outside --image_root"), ({"odd": "x"}, "must be a path")):
        with pytest.raises(data.RowError, match=message):
            data.load_image(image, rows[0] | {"_image_root": str(root)})
    (root / "cut.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(data.RowError, match="cut.parquet: not a whole parquet file"):
        data.read_rows(str(root / "cut.parquet"), None, ())
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(data.RowError, match="a.parquet: parquet takes pyarrow: pip install pyarrow"):
        data.read_rows(str(path), None, ())


READING = """
import sys, pathlib
sys.path.insert(0, %r)
import data, pyarrow.parquet
data.Parquet.KEPT_BYTES = 50 << 20

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024

pathlib.Path("/proc/self/clear_refs").write_text("5")
base = status("VmRSS")
for columns in ({"prompt"}, None):
    rows = data.read_rows("set", None, ("prompt",), columns=columns)
    texts = [rows[i]["prompt"] for i in data.Plan([len(rows)], 2 * len(rows), 0)]
    assert sorted(texts) == sorted(2 * [str(i) for i in range(32)])
    print("peak", status("VmHWM") - base if columns else pyarrow.default_memory_pool().max_memory() >> 20)
"""


@pytest.mark.slow
def test_memory_of_eight_shards(tmp_path):
    """Shards kept a row group of every file in memory, with every column, here 320 MB and more. Columns that the run does
    not use cost nothing; of those that it uses, as many row groups are kept as the bound says, here 50 MB (by pyarrow's own
    count, since its pool keeps what was freed)."""
    for n in range(8):
        rows = [dict(prompt=str(i), scan=random.Random(i).randbytes(10 << 20)) for i in range(4 * n, 4 * n + 4)]
        write_parquet(tmp_path / "set" / f"train-{n}.parquet", rows, group=4)
    used, every = map(float, re.findall(r"peak (\S+)", run(sys.executable, "-c", READING % str(ROOT), cwd=tmp_path)))
    assert used < 50 and every < 250, (used, every)


def test_unused_columns_are_not_read(root):
    """Only the named columns of a parquet file are read, nested ones whole; an error still lists all that the file has."""
    path = write_parquet(root / "a.parquet", [dict(prompt="a", reward_model={"ground_truth": "3"}, scan="x", note="y")])
    rows = data.read_rows(str(path), None, ("prompt",), columns={"prompt", "reward_model", "note", "none"})
    assert {k: v for k, v in rows[0].items() if not k.startswith("_")} == dict(
        prompt="a", images=[], reward_model={"ground_truth": "3"}, note="y", solution="3")
    with pytest.raises(data.RowError, match="no chosen or completion or response column, or an empty one; it has .*scan, note$"):
        data.read_rows(str(path), None, ("chosen",), columns={"chosen"})[0]


def test_a_run_reads_the_columns_that_its_rewards_take(root):
    """A cell of 700 MB that nobody used cost 2.9 GB. Functions that name what they take leave the rest in the file; one
    with **kwargs gets every column, as in TRL."""
    (root / "mine.py").write_text("def named(completions, note, **_):\n    pass\n\n\ndef greedy(completions, **kwargs):\n    pass\n")
    path = write_parquet(root / "a.parquet", [dict(question="a", answer="3", level=1.5, note="y", scan="x")])
    for names, columns in ((["accuracy"], {"question", "answer", "level"}),
                           (["accuracy", "mine.py:named"], {"question", "answer", "level", "note"}),
                           (["mine.py:greedy"], {"question", "answer", "level", "note", "scan"})):
        rewards = rollout.RewardRunner([name.replace("mine.py", str(root / "mine.py")) for name in names], folder=root)
        rewards.wait_until_ready()
        args = Namespace(dataset=[str(path)], dataset_weights=None, eval_dataset=str(path), image_root=None, sort_by="level", columns=None,
                     system_prompt=None)
        for rows in data.rows_of_run(args, ("prompt",), rewards.columns()):
            assert {k for k in rows[0] if not k.startswith("_")} == columns | {"prompt", "solution", "images"}
        rewards.close()


@pytest.mark.parametrize("flags, message", [
    (["--reward_funcs", "broken.py:f"], "broken.py.*invalid syntax|invalid syntax.*broken.py"),
    (["--vllm_server_base_url", "http://127.0.0.1:9"], "--vllm_server_base_url http://127.0.0.1:9: /version"),
    (["--output_dir", "set/run"], "--output_dir set/run lies in the dataset's folder set: the run's own files"),
    (["--dataset", ".", "--output_dir", "run"], "--output_dir run lies in the dataset's folder .: the run's own files"),
    (["--dataset", ".:set/train"], "--output_dir .*runs lies in the dataset's folder .: ")])
def test_cheap_checks_come_first(root, folders, monkeypatch, flags, message):
    """Errors of a reward file or of vLLM's address came after the check of all rows, which may take long. An output folder
    among the data changed the data's digest, so that the run could never be resumed."""
    monkeypatch.chdir(root)
    (root / "broken.py").write_text("def f(:\n")
    write_jsonl(root / "set" / "train.jsonl", [dict(prompt="how many?", image="missing.png", solution="3")])
    before = sorted(root.rglob("*"))
    with pytest.raises(model.InputError, match=message):
        SCRIPTS["train_grpo"].main(["--dataset", "set", "--model_name_or_path", str(folders["qwen2_5_vl"]), *flags])
    assert flags[-1] != "set/run" or sorted(root.rglob("*")) == before


def test_row_groups_of_all_files_share_one_bound(root, monkeypatch):
    """Of the row groups of all files those that were read last stay, as far as they fit, and always the last one."""
    rows = [dict(prompt=str(i) * 1000) for i in range(12)]
    for n in range(3):
        write_parquet(root / "set" / f"train-{n}.parquet", rows[4 * n:4 * n + 4])
    for bound, kept in ((0, 1), (7000, 2), (1 << 20, 6)):
        monkeypatch.setattr(data.Parquet, "kept", OrderedDict())
        monkeypatch.setattr(data.Parquet, "KEPT_BYTES", bound)
        found = data.read_rows(str(root / "set"), None, ("prompt",))
        assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
        assert len(data.Parquet.kept) == kept and next(reversed(data.Parquet.kept)) == (found.parts[2][0], 1)


def test_parquet_and_threads(root):
    """The loader's threads share one row group in memory: a row must not be cut out of another thread's."""
    class Slow(str):
        def __format__(self, spec):  # lets the others in between the group's reading and the row's
            time.sleep(0.001)
            return str(self)

    path = write_parquet(root / "a.parquet", [dict(prompt=f"{i}") for i in range(20)], group=3)
    rows, places = data.read_rows(str(path), None, ("prompt",)), data.Plan([20], 40, 0)
    rows.parts[0][0].path = Slow(path)
    assert [row["prompt"] for row in data.in_order(rows.__getitem__, places, 4)] == [str(i) for i in places]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_is_encoded_as_often_as_it_is_needed(launch, monkeypatch, tmp_path, task, workers):  # noqa: F811
    """Three epochs: once for the check (and the printed sample), once for the reference, once a draw or an evaluation,
    whose loss and answers share it. The reference pass once kept every row of every epoch in memory, and encoded it as
    often: rows of files are new objects at each reading."""
    rows = [json.loads(line) for line in open(task / "pairs.jsonl")]
    write_jsonl(tmp_path / "held_out.jsonl", [row | {"solution": "1", "prompt": "how many?"} for row in rows[:5]])
    sources, encode = Counter(), data.tokenize_prompt
    monkeypatch.setattr(data, "tokenize_prompt", lambda *a: sources.update([a[1]["_source"]]) or encode(*a))
    monkeypatch.setattr(rollout, "RewardRunner", InProcess)
    metrics, _ = launch("train_dpo", "--max_steps", "9", "--per_device_train_batch_size", "4", "--dataloader_num_workers", workers,
                        "--eval_dataset", tmp_path / "held_out.jsonl", "--eval_steps", "9", "--per_device_eval_batch_size", "2",
                        "--max_completion_length", "3")
    held_out = [n for source, n in sources.items() if "held_out" in source]
    trained = [n for source, n in sources.items() if "held_out" not in source]
    assert held_out == [4] * 5 and sorted(trained) == [5] * 11 + [6]
    assert len(metrics) == 9 and metrics[-1].keys() >= {"eval/loss", "eval/accuracy"}


def test_mixtures(root):
    """Draws keep the given proportions at every moment, each dataset by its own epochs; a longer plan begins with a shorter
    one, skipped rows leave no gap, and without weights every row comes once an epoch."""
    for name, n in (("a", 6), ("b", 4), ("c", 2)):
        write_jsonl(root / f"{name}.jsonl", [dict(prompt=f"{name}{i}") for i in range(n)])
    names = [str(root / f"{name}.jsonl") for name in "abc"]
    rows = data.read_rows(names, None, ("prompt",), weights=[1, 2, 1])
    assert len(rows) == 12 and [rows[i]["prompt"] for i in (0, 5, 6, 9, 10, 11)] == ["a0", "a5", "b0", "b3", "c0", "c1"]
    assert data.read_rows(names, None, ("prompt",)).shares is None
    plan = data.Plan(rows.sizes, 64, 3, shares=rows.shares)[:]
    kinds = [rows[i]["prompt"][0] for i in plan]
    for n in range(1, 65):
        counts = Counter(kinds[:n])
        assert all(abs(counts[k] - w * n / 4) <= 1 for k, w in zip("abc", (1, 2, 1)))
    assert Counter(i for i in plan if 6 <= i < 10) == Counter({i: 8 for i in range(6, 10)})
    assert data.Plan(rows.sizes, 20, 3, shares=rows.shares)[:] == plan[:20] != data.Plan(rows.sizes, 20, 4, shares=rows.shares)[:]
    assert not {6, 7} & set(data.Plan(rows.sizes, 64, 3, dropped={6, 7}, shares=rows.shares))
    keys = [-i for i in range(12)]
    assert [i for i in data.Plan(rows.sizes, 16, 3, keys=keys, shares=rows.shares) if 6 <= i < 10] == [9, 8, 7, 6] * 2
    checked, *_ = data.check_rows(rows, 64, 3, "error", 9, 0, 1, lambda row: data.Size(5, 0))
    assert checked[:] == plan
    view = rows[1::2]
    assert [row["prompt"] for row in view] == ["a1", "a3", "a5", "b1", "b3", "c1"] and view[1:3][1]["prompt"] == "a5"


def test_lines_are_found_across_blocks(tmp_path):
    """The index of a file of several blocks of 16 MiB: every line, wherever a block ends, blank ones left out."""
    path, size = tmp_path / "big.jsonl", 1 << 24
    first = json.dumps(dict(prompt="x" * (size - 15)))
    assert len(first) == size - 1, "its newline ends the first block"
    second, third = json.dumps(dict(prompt="y" * (size - 10))), json.dumps(dict(prompt="z"))
    path.write_text(f"{first}\n{second}\r\n\n \r\n{third}")
    rows = data.read_rows(str(path), None, ("prompt",))
    assert [(row["prompt"][-1], row["_source"].rpartition(":")[2]) for row in rows] == [("x", "1"), ("y", "2"), ("z", "5")]


@pytest.mark.slow
def test_both_scripts_take_a_mixture(task, monkeypatch, tmp_path, capsys):  # noqa: F811
    """From the command line: a JSONL file and parquet shards with image bytes, weighed; the sample that is printed is the
    decoded first draw. Refused: weights that do not match."""
    write_parquet(tmp_path / "set" / "train-0.parquet",
                  [dict(prompt="how many shapes are there?", images=[{"bytes": png(size=(48, 48)), "path": None}], solution="3",
                        chosen="<answer>3</answer>", rejected="<answer>4</answer>")] * 5)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rollout, "RewardRunner", InProcess)
    data.build_tiny_vlm(tmp_path / "tiny")
    flags = ["--model_name_or_path", "tiny", "--dataset", str(task / "pairs.jsonl"), "set", "--dataset_weights", "1", "3",
             "--image_root", str(task), "--max_steps", "1", "--max_completion_length", "4"]
    for name, extra in (("train_dpo", ["--per_device_train_batch_size", "8"]),
                        ("train_grpo", ["--per_device_train_batch_size", "16", "--num_generations", "2", "--reward_funcs",
                                        f"{task / 'rewards.py'}:spread"])):
        SCRIPTS[name].main([*flags, *extra, "--output_dir", name])
        out = capsys.readouterr().out
        assert "data: 17 rows, 7 of them in this run, 0 skipped" in out
        assert "<|image_pad|> x 9<|vision_end|>how many shapes are there?<|im_end|>" in out
        assert ("data: completion of " in out) == (name == "train_dpo")
    with pytest.raises(SystemExit):
        SCRIPTS["train_dpo"].main([*flags, "--dataset_weights", "1"])
    assert "--dataset_weights must be one number for each --dataset" in capsys.readouterr().err
