"""What happens when something is wrong, fault by fault. Injected here is what the other files do not inject.

F1   killed at a random point     goes on bit-equal                    test_killed_again_and_again
F2   killed in a later epoch      the same (with workers, too)       test_killed_again_and_again
F3   SIGTERM in any phase         a checkpoint and a good end          test_sigterm_is_a_checkpoint
F4   SIGTERM to one rank          all stop at one step                 test_resume_on_other_numbers_of_ranks
F5   a second signal              ends at once                         test_a_second_signal_ends_at_once
F6   an error, a death on a rank  all end, the message is there        test_an_error_on_one_rank_ends_both,
                                                                       test_a_dead_rank_ends_the_run_and_it_resumes
F7   a reward sleeps on one rank  killed at the limit: no collective   test_rewards_that_hang
                                  waits for it (so no dump of stacks)
F8   another number of ranks      the same batches and losses          test_resume_on_other_numbers_of_ranks
F9   changed flags, data, weights refused with a list                  test_changed_settings_are_refused
F10  --max_hours                  a checkpoint, the schedule unchanged test_max_hours_stops_with_a_checkpoint
F11  a bad checkpoint             named, the one before is used        test_a_bad_checkpoint_falls_back
F12  only bad ones                an error, no fresh start             test_only_bad_checkpoints_are_an_error
F13  more steps of a done run      it goes on from its last step        test_a_finished_run_goes_on_to_more_steps
F14  a full disk on one rank      no rank takes it for written         test_a_full_disk_on_one_rank,
                                                                       test_one_rank_cannot_write
F15  a left-over step_N.tmp       never chosen, never in the way       test_a_left_over_folder_is_replaced
F16  ranks see different files    rank 0 decides                       test_ranks_that_see_different_files
F17  an unwritable folder         an error before the model loads      test_a_folder_that_cannot_be_written
                                  (low space is met by F14: the first
                                  save fails with a warning)
F18  export                       complete, equal in a clean process   test_export_round_trip
F19  malformed rows               file:line and what was expected; no  test_malformed_rows_name_file_and_line,
                                  --bad_rows: mend the file            test_odd_json_is_refused
F20  corrupt images               the row and the file; no skipping    test_bad_images_name_row_and_file,
                                                                       test_damaged_images_are_row_errors
F21  a decompression bomb         refused by its header                test_decompression_bombs_are_not_decoded
F22  odd image modes              RGB as it is shown                   test_images_are_rgb_as_shown
F23  paths out of the root, URLs  refused                              test_bad_images_name_row_and_file
F24  images without a place       the row is named                     test_placeholder_count_must_match
F25  too long a prompt            error, or skipped and counted        test_overlong_is_refused_or_skipped_never_cut
F26  equal or empty answers       the row is named                     test_bad_pairs_are_refused
F27  fewer rows than a batch      rows come again, no rank is empty    test_few_rows
F28  a row encoded twice          the same                             test_prompt_is_what_the_processor_makes
F29  an image id is preferred     never sampled                        test_placeholders_are_never_sampled
F30  EOS at once                  a completion of length 1             test_eos_ends_and_belongs_to_the_completion
F31  no EOS                       truncated; all masked: a step of 0   test_a_step_of_truncated_completions_only
F32  pad is EOS                   the mask ends with the first EOS     test_eos_ends_and_belongs_to_the_completion
F33  ranks of different lengths   no hang                              test_resume_on_other_numbers_of_ranks
F34  no images on one rank        the same gradients                   test_ranks_and_micro_batches_change_nothing
F35  several images, uneven sizes as one by one                        test_packed_equals_transformers_one_by_one
F36  out of memory                met before step 1, one clear error   test_preflight_changes_nothing
F37  a reward raises, nan, count  an error that names the row          test_faulty_rewards_are_named,
                                                                       test_what_a_reward_may_return
F38  a reward hangs               killed, tried alone, counted         test_rewards_that_hang
F39  a reward crashes, or bloats  the same; what it prints is not held test_rewards_that_crash
                                  back: that is how rewards are debugged
F40  equal, absent, lone rewards  advantage 0; G = 1 is refused        test_every_estimator_keeps_the_promises,
                                                                       test_group_of_one_is_refused
F41  huge rewards, tiny spreads   finite, no noise amplified           test_huge_and_tiny_rewards
F42  a gradient of nan            all ranks skip; three end the run    test_a_gradient_of_nan_is_skipped,
                                                                       test_nan_on_one_rank_is_seen_by_all
F43  a log-ratio of 100           finite                               test_outliers_stay_finite
F44  masked rows, batches, ranks  contribute 0                         test_fully_masked_row_contributes_nothing,
                                                                       test_counts_are_those_of_all_ranks
F45  typos, flags without effect  an error with the nearest name       test_bad_arguments,
                                                                       test_every_flag_is_read_and_explained
F46  sizes that do not divide     an error with one that does          test_bad_arguments
F47  no vision model, no template one line                             test_wrong_model_paths_are_one_error,
                                                                       test_models_that_are_not_loaded
F48  gloo's threads end late      exit code 0 for a run that is done   test_a_late_thread_aborts_no_finished_run
"""

import ast
import functools
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import socket
import struct
import sys
import tempfile
import time
import zlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, python, run
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import data
import losses
import model
import rollout
import train_dpo
import train_grpo

FORK = multiprocessing.get_context("fork")
pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
              pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]


def test_the_table_is_complete():
    """A row without a test, or with one that is gone, is a promise that nobody keeps."""
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert re.findall(r"^F(\d+) ", __doc__, re.M) == [str(n) for n in range(1, 49)]
    for row in re.split(r"^(?=F\d+ )", __doc__, flags=re.M)[1:]:
        named = re.findall(r"test_\w+", row)
        assert named and all(f"def {name}(" in tests for name in named), row


def ranks(function, world=2, timeout=60):
    """[function(rank) of each of `world` forked processes, in one gloo group]. An error in one of them, or a hang, is
    an AssertionError here. (A forked process cannot run backward().)"""
    def work(rank, connection):
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
            connection.send((True, function(rank)))
        except BaseException as error:
            connection.send((False, f"rank {rank}: {type(error).__name__}: {error}"))
        connection.recv()  # wait for the others: a group that ends early is an error of theirs
        os._exit(0)

    with tempfile.TemporaryDirectory() as folder:
        pipes = [FORK.Pipe() for _ in range(world)]
        processes = [FORK.Process(target=work, args=(rank, pipes[rank][1]), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        answers = []
        for ours, _ in pipes:
            answers.append(ours.recv() if ours.poll(max(0, end - time.monotonic())) else (False, "a hang"))
            end = end if answers[-1][0] else time.monotonic() + 1  # the others wait for this one in vain
        for process in processes:
            process.kill()
            process.join()
    assert all(fine for fine, _ in answers), answers
    return [answer for _, answer in answers]


# --- storage


def parts(shard=False):
    """A model and an optimizer that has taken no step; anything with parameters is a policy to a checkpoint."""
    torch.manual_seed(0)
    policy = nn.Linear(300, 1000)
    if shard:
        fully_shard(policy, mesh=model.device_mesh("cpu", None))
    return policy, torch.optim.AdamW(policy.parameters(), lr=0.1)


def step(policy, optimizer):
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return [p.detach().clone() for p in policy.parameters()]


def save(folder, number, policy, optimizer, rank=0):
    return model.save_checkpoint(folder, policy, optimizer, None, {"step": number}, {}, keep=2, rank=rank)


def one_rank_cannot_write(folder, bad):
    """F14: (True if written) on each of two ranks, of a save while the disk of rank `bad` is full, and of the next."""
    def work(rank):
        policy, optimizer = parts(shard=True)
        if rank == bad:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        first = save(folder, 1, policy, optimizer, rank)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return first, save(folder, 2, policy, optimizer, rank)

    return ranks(work)


@pytest.mark.parametrize("bad", [0, 1])
def test_one_rank_cannot_write(tmp_path, bad):
    """F14: whichever rank it is, both say that there is no checkpoint, nothing half-made stays, and the next works."""
    assert one_rank_cannot_write(tmp_path, bad) == [(False, True)] * 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_2"]


def folder_of_rank_0_only(folder):
    """D6: on rank 0 alone the folder cannot be made (somebody's file has its name)."""
    (folder / "checkpoints").write_text("")
    return ranks(lambda rank: save(folder, 1, *parts(), rank), timeout=20)


def test_a_folder_that_only_rank_0_cannot_make(tmp_path):
    """Automodel #3254: FileExistsError on rank 0 alone, and the others hang. Both return False."""
    assert folder_of_rank_0_only(tmp_path) == [False, False]


def test_a_left_over_folder_is_replaced(tmp_path):
    """F15: a step_N.tmp of a killed save, and a step_N without manifest, are in nobody's way."""
    for name in ("step_3.tmp", "step_3"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "junk").write_text("x")
    assert save(tmp_path, 3, *parts())
    assert not (tmp_path / "checkpoints" / "step_3.tmp").exists()
    assert not (tmp_path / "checkpoints" / "step_3" / "junk").exists()
    assert model.load_checkpoint(tmp_path, *parts(), None, 0)[0]["step"] == 3


def test_ranks_that_see_different_files(tmp_path, monkeypatch):
    """F16, KempnerForge #49: on a slow network file system one rank does not see the newest checkpoint. Rank 0's list
    counts, and no rank takes another way through the collectives."""
    for number in (1, 2):
        assert save(tmp_path, number, *parts())
    found = model.checkpoints_in

    def work(rank):
        model.checkpoints_in = lambda folder: found(folder)[rank:]
        return model.load_checkpoint(tmp_path, *parts(), None, rank)[0]["step"]

    assert ranks(work) == [2, 2]


def test_every_file_of_a_checkpoint_is_checked(tmp_path):
    """The check left out the first file of the manifest: a flipped bit of it was read. Whichever file it is, the checkpoint
    before is used."""
    names = None
    for i in range(9):
        folder = tmp_path / str(i)
        for number in (1, 2):
            assert save(folder, number, *parts())
        newest = folder / "checkpoints" / "step_2"
        names = sorted(json.loads((newest / "manifest.json").read_text()))
        if i == len(names):
            break
        content = bytearray((newest / names[i]).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / names[i]).write_bytes(content)
        assert model.load_checkpoint(folder, *parts(), None, 0)[0]["step"] == 1, names[i]
    assert {".metadata", "state.json", "rollout.safetensors"} < set(names) and i == len(names)


def test_a_rank_without_its_launcher_ends(monkeypatch):
    """torchrun killed while its ranks import torch: they waited an hour for its store, two processes nobody knew of."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port)),
                        ("TORCHELASTIC_USE_AGENT_STORE", "True")):
        monkeypatch.setenv(name, value)
    with pytest.raises(model.InputError, match=f"torchrun at 127.0.0.1:{port} is gone"):
        model.init_distributed("cpu")


def no_state_is_made_up(folder):
    """A checkpoint before the first step, loaded into a fresh run: its first step is that of a run left alone."""
    assert save(folder, 0, *parts())
    policy, optimizer = parts()
    model.load_checkpoint(folder, policy, optimizer, None, 0)
    for ours, theirs in zip(step(policy, optimizer), step(*parts())):
        assert torch.equal(ours, theirs)
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_a_checkpoint_before_the_first_step(tmp_path):
    """torch makes up an optimizer state, of one step, for an optimizer that has none."""
    no_state_is_made_up(tmp_path)


def an_old_checkpoint_that_stays(folder, monkeypatch):
    """Three saves, of which two are kept; the oldest cannot be deleted."""
    def busy(path, ignore_errors=False):
        if path.name == "step_1" and not ignore_errors:
            raise OSError(16, "Device or resource busy")
        return rmtree(path, ignore_errors)

    rmtree = shutil.rmtree
    monkeypatch.setattr(model.shutil, "rmtree", busy)
    for number in (1, 2, 3):
        assert save(folder, number, *parts())


def test_an_old_checkpoint_that_cannot_be_deleted(tmp_path, monkeypatch, capsys):
    """The new one is in place: a warning, and no failed save."""
    an_old_checkpoint_that_stays(tmp_path, monkeypatch)
    assert "step_1 cannot be deleted" in capsys.readouterr().out
    assert [p.name for p in model.checkpoints_in(tmp_path)] == ["step_3", "step_2"]


def garbage_in_the_metrics(folder):
    lines = ['{"step": 0}', '{"st\0', "", "[1]", '{"step": null}', '{"step": 1}', '{"step": 2}']
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 1, "lo')
    try:
        model.forget_after(folder, 1)
    except Exception as error:
        raise AssertionError(f"raised on rank 0 alone: {error!r}") from error
    assert (folder / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_garbage_in_metrics_is_dropped_and_said(tmp_path, capsys):
    """A line that a power cut left must not raise on rank 0, while the others go into the next collective."""
    garbage_in_the_metrics(tmp_path)
    assert capsys.readouterr().out.count("warning: no metrics, dropped") == 4


@pytest.mark.parametrize("module", [train_dpo, train_grpo])
@pytest.mark.parametrize("output", ["taken", "/proc/self/runs/a"])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, module, output):
    """F17: the error comes first, before data and model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(model.InputError, match=f"--output_dir {output}"):
        module.main(["--output_dir", output])


def test_shard_size_without_ranks(tmp_path):
    """One process cannot share anything: said, and not ignored."""
    with pytest.raises(model.InputError, match="--shard_size 2 must divide the number of ranks, 1"):
        train_dpo.main(["--shard_size", "2", "--output_dir", str(tmp_path / "r")])


# --- data


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "a", "prompt": "b"}', "a column stands twice among prompt, prompt"),
    ('{"prompt": ' + "[" * 100_000, "not valid JSON"), ('{"prompt": Infinity}', "Infinity is not JSON"),
    (r'{"prompt": "half an emoji \ud83d"}', "surrogates not allowed"), ('{"prompt": ' + "9" * 5000 + "}", "not valid JSON"), ("\ud7ff", "not valid JSON")])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_odd_json_is_refused(tmp_path, name, line, message):
    """F19: json itself keeps the last of two equal keys, reads Infinity, and dies of depth."""
    (tmp_path / name).write_text(line + "\n")
    with pytest.raises(data.RowError, match=f"{name}(:1)?: .*{message}"):
        list(data.read_rows(str(tmp_path / name), None, ("prompt",)))


def png(width, height, *chunks):
    """A PNG of a few bytes that says it is of that size."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(50_000, 50_000), (12_000, 12_000), (1, data.MAX_IMAGE_PIXELS + 1)])
def test_decompression_bombs_are_not_decoded(tmp_path, monkeypatch, size):
    """F21: 100 bytes that claim 2.5 gigapixels (Pillow refuses), or 144 megapixels (Pillow only warns, and takes
    400 MB): refused by the header alone."""
    (tmp_path / "bomb.png").write_bytes(png(*size))
    monkeypatch.setattr(Image.Image, "load", None)  # decoding would fail
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(data.RowError, match=r"f:1: image .*bomb.png cannot be read: .*pixels"):
        data.load_image("bomb.png", {"_source": "f:1", "_image_root": str(tmp_path)})


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "EPS"])
def test_other_formats_are_not_opened(tmp_path, kind):
    """Security: each decoder is an attack surface; a name that ends in .png does not decide which one runs."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", kind)
    with pytest.raises(data.RowError, match="cannot identify image file"):
        data.load_image("a.png", {"_source": "f:1", "_image_root": str(tmp_path)})


@pytest.mark.parametrize("kind", data.IMAGE_FORMATS)
def test_damaged_images_are_row_errors(tmp_path, kind):
    """F20: changed and missing bytes anywhere give a picture or a RowError, and no other exception."""
    rng, buffer, row, refused = random.Random(0), io.BytesIO(), {"_source": "f:1", "_image_root": str(tmp_path)}, 0
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(buffer, kind)
    for _ in range(150):
        content = bytearray(buffer.getvalue())
        content[rng.randrange(rng.choice([40, len(content)]))] = rng.randrange(256)
        (tmp_path / "x").write_bytes(content[:rng.choice([len(content), rng.randrange(len(content))])])
        try:
            assert data.load_image("x", row).mode == "RGB"
        except data.RowError:
            refused += 1
    assert refused > 20


def shown(tmp_path, image, kind="PNG", **options):
    image.save(tmp_path / "a", kind, **options)
    loaded = data.load_image("a", {"_source": "f:1", "_image_root": str(tmp_path)})
    assert loaded.mode == "RGB"
    return loaded.size, loaded.getpixel((0, 0))


def test_images_are_rgb_as_shown(tmp_path):
    """F22: 16-bit grey is not clipped to white, what is transparent is white and not the colour beneath, the EXIF tag
    turns, an animation gives its first frame; one pixel and a line of them are pictures."""
    assert shown(tmp_path, Image.new("1", (2, 1), 1)) == ((2, 1), (255, 255, 255))
    assert shown(tmp_path, Image.new("L", (1, 1), 7)) == ((1, 1), (7, 7, 7))
    assert shown(tmp_path, Image.fromarray(np.array([[32768]], dtype=np.uint16))) == ((1, 1), (128, 128, 128))
    assert shown(tmp_path, Image.new("LA", (1, 1), (0, 0))) == ((1, 1), (255, 255, 255))
    assert shown(tmp_path, Image.new("RGBA", (1, 1), (200, 0, 0, 255))) == ((1, 1), (200, 0, 0))
    assert shown(tmp_path, Image.new("RGBA", (1, 1), (0, 0, 0, 0))) == ((1, 1), (255, 255, 255))
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert shown(tmp_path, palette) == ((1, 1), (9, 8, 7))
    assert shown(tmp_path, palette, transparency=1) == ((1, 1), (255, 255, 255))
    assert shown(tmp_path, Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "JPEG")[1][0] > 240
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert shown(tmp_path, Image.new("RGB", (4, 2)), "JPEG", exif=exif)[0] == (2, 4)
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    assert shown(tmp_path, frames[0], "GIF", save_all=True, append_images=frames[1:])[1] == (255, 0, 0)
    assert shown(tmp_path, Image.new("RGB", (1, 10_000), "red")) == ((1, 10_000), (255, 0, 0))


def test_exif_is_read_not_written(tmp_path):
    """exif_transpose writes all tags anew: a good photograph with an odd one (a double where Pillow wants a number) ended
    the run with a bare struct.error. Every way to turn is Pillow's own."""
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 2, 3) * 10
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        ours = data.load_image("a.png", {"_source": "f:1", "_image_root": str(tmp_path)})
        with Image.open(tmp_path / "a.png") as image:
            assert np.array_equal(np.array(ours), np.array(ImageOps.exif_transpose(image).convert("RGB"))), orientation
    entries = [struct.pack("<HHI4s", 0x0112, 3, 1, struct.pack("<HH", 6, 0)), struct.pack("<HHII", 0x0100, 12, 1, 38)]
    tags = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries[::-1]) + struct.pack("<Id", 0, 1.5)
    Image.new("RGB", (4, 2), "red").save(tmp_path / "b.jpg", exif=tags)
    with Image.open(tmp_path / "b.jpg") as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert data.load_image("b.jpg", {"_source": "f:1", "_image_root": str(tmp_path)}).size == (2, 4)


def test_an_aspect_ratio_that_the_processor_refuses(loaded):
    """F22: the processor's own exception names the row."""
    policy, processor = loaded("qwen2_5_vl")
    row = {"prompt": "q", "images": [Image.new("RGB", (1, 10_000))], "_source": "f:1", "_image_root": None}
    with pytest.raises(data.RowError, match="f:1: the processor refused it: .*aspect ratio"):
        data.encode_prompt(policy, processor, row)


def test_few_rows():
    """F27: a batch larger than the data goes on into the next epoch; held-out rows that cannot serve every rank are an
    error and no empty rank."""
    assert sorted(data.Plan([3], 9, seed=0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(model.InputError, match="2 held-out rows for 4 ranks"):
        data.check_eval_rows([{}, {}], 100, 3, 4, lambda row: 1)
    assert data.check_eval_rows([], 100, 3, 4, lambda row: 1) == ([], {})


# --- models


def json_file(name, at=(), **changes):
    """A change of a model's folder: keys of one of its JSON files, at a path of keys."""
    def change(folder):
        content = json.loads((folder / name).read_text())
        functools.reduce(lambda value, key: value[key], at, content).update(changes)
        (folder / name).write_text(json.dumps(content))
    return change


def file(name, content):
    """Another content of a file: text, bytes, or what a function makes of the bytes that it has."""
    def change(folder):
        old = (folder / name).read_bytes() if callable(content) else b""
        new = content(old) if callable(content) else content
        (folder / name).write_bytes(new.encode() if isinstance(new, str) else new)
    return change


def replaced(name, make):
    """A link, FIFO or folder in place of a file."""
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
    return change


def tensors(function):
    def change(folder):
        content = function(model.load_file(folder / "model.safetensors"))
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return change


def indexed(name):
    """Weights in a.safetensors and, pickled, in a.bin; the index names another file."""
    def change(folder):
        content = model.load_file(folder / "model.safetensors")
        torch.save(content, folder / "a.bin")
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(content, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return change


def down_proj(content, of=lambda x: x):
    return {k: of(x) if "0.mlp.down_proj" in k and "visual" not in k else x for k, x in content.items()}


CODE = {name: "code.Evil" for name in ("AutoConfig", "AutoProcessor", "AutoModelForImageTextToText", "AutoTokenizer")}
SECRET = "../secret.json"  # outside the folder; it exists
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NO_MODELS = {  # name: (what is changed in the folder, what the one line says)
    "code in config": (json_file("config.json", auto_map=CODE), "config.json asks for code of its own"),
    "code in processor": (json_file("processor_config.json", auto_map=CODE), "processor_config.json asks for code of its own"),
    "code in tokenizer": (json_file("tokenizer_config.json", auto_map=CODE), "tokenizer_config.json asks for code of its own"),
    "kernel": (json_file("config.json", _attn_implementation="owner/kernel"), "config.json asks for a kernel from a hub"),
    "kernel of a part": (json_file("config.json", ["text_config"], attn_implementation="owner/kernel"), "asks for a kernel from a hub"),
    "other weights": (json_file("config.json", transformers_weights="b.safetensors"), "config.json asks for other weights"),
    "timm": (json_file("config.json", ["vision_config"], model_type="timm_wrapper"), "asks for timm"),
    "other model": (json_file("processor_config.json", audio_tokenizer={
        "audio_tokenizer_class": "LlamaForCausalLM", "audio_tokenizer_name_or_path": ".."}), "asks for another model"),
    "other tokenizer": (json_file("tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"]), "asks for other files"),
    "other classes": (json_file("processor_config.json", image_processor={
        "image_processor_type": "OneFormerImageProcessor", "repo_path": "..", "class_info_file": "secret.json"}), "asks for other files"),
    "a pickle": (lambda folder: (indexed("a.bin")(folder), (folder / "a.safetensors").unlink()), "names a.bin: only safetensors"),
    "only a pickle": (replaced("model.safetensors", lambda path: torch.save({}, path.with_name("pytorch_model.bin"))),
                      "only safetensors are read"),
    "weights outside": (indexed("../a.safetensors"), "names ../a.safetensors: only safetensors in the folder"),
    "a shard less": (indexed("b.safetensors"), "b.safetensors: missing"),
    "an index of nothing": (lambda folder: (indexed("a")(folder), file("model.safetensors.index.json", "[]")(folder)),
                            "model.safetensors.index.json: expected the objects"),
    "an adapter": (file("adapter_config.json", "{}"), "adapter_config.json: a PEFT adapter"),
    "half the weights": (file("model.safetensors", lambda old: old[:9999]), "model.safetensors: cut or damaged"),
    "weights of git-lfs": (file("model.safetensors", LFS), "model.safetensors: a git-lfs pointer"),
    "tokenizer of git-lfs": (file("tokenizer.json", LFS), "tokenizer.json: a git-lfs pointer"),
    "a web page": (file("config.json", "<!DOCTYPE html><html>"), "config.json: a web page"),
    "half a tokenizer": (file("tokenizer.json", lambda old: old[:999]), "tokenizer.json: not JSON"),
    "generation config": (file("generation_config.json", "{"), "generation_config.json: not JSON"),
    "no object": (file("processor_config.json", "[]"), "processor_config.json: expected a JSON object, got list"),
    "EOS": (json_file("generation_config.json", eos_token_id="x"), "neither generation_config.json nor the tokenizer names an EOS token"),
    "a length": (json_file("tokenizer_config.json", model_max_length="x"), "tokenizer_config.json: TypeError"),
    "no config": (replaced("config.json", lambda path: None), "config.json: missing"),
    "no class": (json_file("config.json", model_type="nosuch"), "config.json: ValueError: .*nosuch"),
    "a FIFO": (replaced("tokenizer.json", os.mkfifo), "tokenizer.json: not a regular file"),
    "a folder": (replaced("generation_config.json", os.mkdir), "generation_config.json: a folder"),
    "link outside": (replaced("tokenizer_config.json", lambda path: path.symlink_to(SECRET)), "tokenizer_config.json: a link that leaves"),
    "weights linked": (replaced("model.safetensors", lambda path: path.symlink_to(SECRET)), "model.safetensors: a link that leaves"),
    "templates linked": (lambda folder: (folder / "additional_chat_templates").symlink_to("../templates"), "a.jinja: a link that leaves"),
    "dangling": (replaced("chat_template.jinja", lambda path: path.symlink_to("/nowhere")), "chat_template.jinja: a link to nothing"),
    "no template": (replaced("chat_template.jinja", lambda path: None), "has no chat template"),
    "template's syntax": (file("chat_template.jinja", "{% for"), "chat_template.jinja: TemplateSyntaxError"),
    "template's include": (file("chat_template.jinja", "{% include '../secret.json' %}"), "chat_template.jinja: "),
    "8 bits": (json_file("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "only bitsandbytes' 4-bit"),
    "GPTQ": (json_file("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "only bitsandbytes' 4-bit"),
    "a tensor less": (tensors(lambda x: {k: v for k, v in x.items() if k not in down_proj(x) or "0.mlp.down_proj" not in k or "visual" in k}),
                      r"model.safetensors: 1 tensors of the model are missing \(\S*down_proj.weight\); 0 have other names"),
    "renamed": (tensors(lambda x: {"x." + k: v for k, v in x.items()}), "model.safetensors: 56 tensors of the model are missing .*; 56 have"),
    "shape": (tensors(lambda x: down_proj(x, lambda w: w[:5].clone())), r"1 tensors are of another shape .*\[5, 256\], not \[128, 256\]"),
    "nan": (tensors(lambda x: down_proj(x, lambda w: w * float("nan"))), r"model.safetensors: \S*down_proj.weight holds nan"),
}


def test_models_that_are_not_loaded(folders, tmp_path, capfd):
    """F47 and security: a model's folder is data. Each of these folders is refused in one line that names the file, and
    nothing outside of it is opened, fetched, unpickled or run meanwhile. A missing tensor was once trained from random
    numbers, an unreadable generation_config.json passed over, and a pickle read because an index named it."""
    folder, seen = tmp_path / "models" / "m", []
    (tmp_path / "models" / "templates").mkdir(parents=True)
    (tmp_path / "models" / "templates" / "a.jinja").write_text("x")
    for name in ("secret.json", "tokenizer.4.0.json"):
        (tmp_path / "models" / name).write_text("{}")

    def hook(event, args):  # cannot be taken away again: `watching` ends it
        if watching and event in ("open", "socket.connect", "subprocess.Popen", "pickle.find_class", "os.system"):
            path = os.path.abspath(os.fsdecode(args[0])) if event == "open" and not isinstance(args[0], int) else ""
            if event != "open" or path.startswith(str(tmp_path)) and not path.startswith(str(folder)) or path.endswith(".bin"):
                seen.append((event, *args))

    watching = True
    sys.addaudithook(hook)
    for name, (change, expected) in NO_MODELS.items():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders["qwen2_5_vl"], folder)
        watching = False
        change(folder)
        watching = True
        try:
            model.load_policy(str(folder))
            message = "loaded"
        except model.InputError as error:
            message = str(error)
        assert re.search(expected, message) and str(folder) in message and "\n" not in message, (name, message)
        assert not seen, (name, seen)
    watching = False


def test_only_a_models_files_reach_final(folders, tmp_path):
    """A note that links out of the model's folder was copied to final/ and uploaded; a dangling link, a FIFO or a folder
    named like a file ended the run at its export. They are named before training; links of a hub's cache are read."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for i, source in enumerate(sorted(folders["qwen2_5_vl"].iterdir())):
        shutil.copyfile(source, blobs / f"{i}")
        (snapshot / source.name).symlink_to(f"../../blobs/{i}")
    (tmp_path / "private.txt").write_text("not part of the model")
    (snapshot / "notes.txt").symlink_to(tmp_path / "private.txt")
    (snapshot / "old.json").symlink_to("/nowhere/x")
    os.mkfifo(snapshot / "pipe.json")
    (snapshot / "extra.json").mkdir()
    (snapshot / "train.json").write_text("{}")
    policy, processor = model.load_policy(str(snapshot))
    note = next(note for note in policy.notes if note.startswith("final/ will not have"))
    assert all(name in note for name in ("notes.txt (a link that leaves", "old.json (a link to nothing)",
                                         "pipe.json (not a regular file)", "extra.json (a folder)"))
    shutil.rmtree(snapshot)  # what the start has read is what final/ gets
    model.export(policy, tmp_path / "final")
    assert {f.name for f in (tmp_path / "final").iterdir()} == {f.name for f in folders["qwen2_5_vl"].iterdir()}
    assert model.load_policy(str(tmp_path / "final"))[1].chat_template == processor.chat_template


def test_error_lines_hold_no_control_characters():
    """A model's text, a row or a server's answer in an error line could move the cursor, or clear the screen."""
    assert str(model.InputError("a\x1b[2J\x9b\r\x07b\n汉 é")) == "a\\x1b[2J\\x9b\\r\\x07b\n汉 é"
    assert str(data.RowError("\x1b")) == r"\x1b"


def test_every_import_is_known():
    """Nothing can be unpickled, fetched or executed without an import for it: what the program imports is this. The one
    thing that speaks HTTP by itself is rollout.VLLMServer, to the address of its flag."""
    known = {"PIL", "argparse", "atexit", "base64", "bitsandbytes", "collections", "concurrent", "contextlib", "copy", "ctypes",
             "data", "dataclasses", "datetime", "decimal", "difflib", "fcntl", "functools", "hashlib", "huggingface_hub", "importlib", "inspect", "io", "itertools",
             "answers", "asyncio", "json", "layers", "losses", "math", "math_verify",
             "model", "multiprocessing", "numpy", "operator", "os", "papers", "pathlib", "pyarrow", "random", "re", "resource",
             "rewards", "rollout", "safetensors", "shlex", "shutil", "signal", "socket", "struct", "subprocess", "sys", "tempfile",
             "threading", "time",
             "tokenizers", "torch", "tqdm", "traceback", "transformers", "types", "typing",
             "unicodedata", "uuid", "warnings", "weakref", "zlib"}
    for file in [*ROOT.glob("*.py"), *ROOT.glob("rewards/*.py"), *ROOT.glob("layers/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or "rewards"] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                more = {"http", "urllib"} if file.name == "rollout.py" else set()
                assert {name.split(".")[0] for name in names} <= known | more, (file.name, names)
            if isinstance(node, ast.Call):
                called, keywords = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
                assert called not in ("eval", "exec", "compile", "__import__", "torch.load", "os.system"), file.name
                assert not {"shell", "weights_only", "trust_remote_code"} & keywords, (file.name, called)


# --- rewards


REWARD_FILE = '''
import dataclasses, os, re, signal, subprocess, sys, time
import numpy

def sleep():
    while True:
        try:
            time.sleep(9)
        except Exception:
            pass

class Swallow:
    def __del__(self):  # a finalizer: the exception that an alarm raises in it is printed, and lost
        time.sleep(0.2)

def alarmed():
    def ring(*_):
        raise TimeoutError
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    x = Swallow()
    del x
    time.sleep(60)

def fork():
    print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, file=open("grandchild", "w"))
    os.abort()

DO = {
    "sleep": sleep, "alarm": alarmed, "regex": lambda: re.match("(a+)+$", "a" * 60 + "b"),
    "exit": lambda: os._exit(3), "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV), "fork": fork,
    "memory": lambda: numpy.empty(8 << 30, "u1"), "quit": lambda: sys.exit("no"),
}

def nasty(completions, **_):
    for text in completions:
        DO.get(text, lambda: None)()
    return [float(len(text)) for text in completions]

def slow(completions, **_):
    time.sleep(0.1 * len(completions))
    return [1.0 for _ in completions]

def returns(completions, what, **_):
    if "torch" in what[0]:
        import torch
    return eval(what[0])

async def later(completions, **_):
    return [float(len(text)) for text in completions]

def helped(completions, **_):
    import helper
    return [helper.score(text) for text in completions]

class Own(float):
    pass

@dataclasses.dataclass
class Verdict:  # asks sys.modules for the module that it stands in
    score: float = 1.0

LOADED = open(__file__ + ".loaded", "a").write("once ")

def verdict(completions, **_):
    return [Verdict().score for _ in completions]
'''


@pytest.fixture(scope="module")
def returns(tmp_path_factory):
    """One runner of REWARD_FILE's returns(): its process imports torch once."""
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(REWARD_FILE)
    made = rollout.RewardRunner([f"{file}:returns"])
    yield made
    made.close()


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """runner("nasty", timeout=...): a runner of that function of REWARD_FILE."""
    (tmp_path / "mine.py").write_text(REWARD_FILE)
    monkeypatch.chdir(tmp_path)
    made = []

    def make(name, **options):
        made.append(rollout.RewardRunner([f"{tmp_path / 'mine.py'}:{name}"], **options))
        return made[-1]

    yield make
    for runner in made:
        runner.close()


def score(runner, texts, **columns):
    rows = [{"_source": f"rows.jsonl:{i}", "prompt": "q", **columns} for i in range(len(texts))]
    return runner.score(texts, rows, step=7)[0].tolist()


def lengths(texts, bad):
    return pytest.approx([float("nan") if text in bad else len(text) for text in texts], nan_ok=True)


def test_rewards_that_crash(runner, capsys):
    """F39: what ends its process (exit, segmentation fault, 8 GB, a signal while idle, with children of its own) is
    named and counted, gets no reward, and takes nothing else with it."""
    nasty, bad = runner("nasty"), ["exit", "segfault", "memory", "fork", "quit"]
    texts = ["one", *bad, "three"]
    assert score(nasty, texts) == lengths(texts, bad) and nasty.failed == 5
    said = capsys.readouterr().out
    for row, text in enumerate(bad, 1):
        assert f"row rows.jsonl:{row}, completion '{text}': it abstains" in said
    for code in (3, -11, 1, -6):
        assert f"its process died (exit code {code}); row" in said
    nasty.process.kill()  # between two calls
    nasty.process.wait()
    assert score(nasty, ["four"]) == [4] and nasty.failed == 0
    grandchild = int(open("grandchild").read())
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{grandchild}") and "Z" not in open(f"/proc/{grandchild}/stat").read().split()[2]:
        assert time.monotonic() < deadline, "what a reward started must end with it"
        time.sleep(0.05)


def too_many_crashes(nasty):
    """Twelve of the latest 256 may crash it; the thirteenth ends the run, whatever came in between."""
    assert score(nasty, ["exit"] * 12 + ["fine"]) == lengths(["exit"] * 12 + ["fine"], ["exit"])
    assert score(nasty, ["fine"]) == [4]
    with pytest.raises(rollout.RewardError, match="completion 'exit': the 13th of the latest 256 completions"):
        score(nasty, ["fine", "exit"])


def test_too_many_crashes_end_the_run(runner):
    """A function that is broken for good must not leave a run that trains on what is left."""
    too_many_crashes(runner("nasty"))


def test_one_by_one_has_an_end(runner, monkeypatch):
    """Completions that are slow, each within its quarter of the limit, were tried for as long as they took: other ranks
    gave up after an hour, with an error that named no reward."""
    monkeypatch.setattr(rollout.RewardRunner, "MOST", 1)
    with pytest.raises(rollout.RewardError, match=r"of its 40 completions, tried one by one, \d+ took 2 s: raise --reward_ti"):
        score(runner("slow", timeout=2.0), ["four"] * 40)


def test_a_file_of_several_rewards_is_loaded_once(runner, monkeypatch):
    """A file that two functions come from ran twice, with two states, and a dataclass in it could not be made."""
    two = rollout.RewardRunner(["mine.py:verdict", "mine.py:nasty"])
    assert two.score(["four"], [{"_source": "f:1", "prompt": "q"}], step=1).tolist() == [[1.0], [4.0]]
    two.close()
    monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("by now that number may be another's"))
    two.close()
    assert open("mine.py.loaded").read() == "once "


def test_a_signal_to_all_processes_is_no_crash(runner):
    """The scheduler that ends a run tells every process of it: nothing is tried again, `Stop` takes it from there."""
    nasty = runner("nasty")
    nasty.wait_until_ready()
    os.kill(nasty.process.pid, model.signal.SIGTERM)
    nasty.process.wait()
    with pytest.raises(rollout.RewardError, match=r"died \(exit code -15\)"):
        score(nasty, ["four"])


@pytest.mark.slow
def test_rewards_that_hang(runner, capsys):
    """F7, F38, open-r1 #658: a sleep that catches every exception, an alarm that a finalizer swallows, a catastrophic
    regular expression: killed at the limit, tried alone with a quarter of it, counted, named."""
    nasty, bad = runner("nasty", timeout=3.0), ["sleep", "alarm", "regex"]
    texts = ["one", *bad, "three"]
    began = time.monotonic()
    assert score(nasty, texts) == lengths(texts, bad) and nasty.failed == 3
    assert time.monotonic() - began > 3 + 3 * 0.75
    said = capsys.readouterr().out
    killed = "s (--reward_timeout); its process was killed"
    assert f"step 7: no answer within 3 {killed}; its 5 completions are tried one by one" in said
    assert f"no answer within 0.75 {killed}; row rows.jsonl:2, completion 'alarm': it abstains" in said


@pytest.mark.parametrize("what, expected", [
    ("[1, 0.5, None]", [1, 0.5, None]), ("(True, 2, 3)", [1, 2, 3]), ("numpy.arange(3)", [0, 1, 2]),
    ("torch.arange(3.0).half()", [0, 1, 2]), ("[numpy.float32(1), torch.tensor(2.0), 3]", [1, 2, 3]),
    ("[torch.tensor([0.5]), torch.tensor(2.0), numpy.ones((1, 1))]", [0.5, 2, 1]),
    ("torch.tensor(1.0)", "expected a list of 3 numbers, got float"), ("1.0", "a list of 3 numbers, got float"),
    ("'123'", "got str"), ("{1, 2, 3}", "got set"), ("[1.0]", "expected 3 rewards, one a completion, got 1"),
    ("numpy.ones((3, 1))", [1, 1, 1]), ("torch.ones(3, 1)", [1, 1, 1]), ("[Own(1), Own(2), 3]", [1, 2, 3]),
    ("(float(x) for x in '123')", [1, 2, 3]), ("numpy.ones((3, 2))", r"\[1.0, 1.0\] is not a number; row rows.jsonl:0"),
    ("[1j, 2, 3]", "1j is not a number; row rows.jsonl:0"),
    ("[1, 2, 10**400]", "is not a number; row rows.jsonl:2"), ("[1, float('nan'), 1]", "returned nan .*rows.jsonl:1"),
    ("numpy.array([1, 1, numpy.inf])", "returned inf .*row rows.jsonl:2"),
    ("(x for x in 'abc')", "'a' is not a number; row rows.jsonl:0"), ("[1, 'a', 1]", "'a' is not a number; row rows.jsonl:1"),
    ("[[1], [2], [3]]", "is not a number"), ("[1, object(), 2]", "is not a number; row rows.jsonl:1")])
def test_what_a_reward_may_return(returns, what, expected):
    """F37: numbers of any library, None; everything else names function, step and completion. What crosses is plain
    numbers: a class of the file is never unpickled here."""
    if isinstance(expected, list):
        values = [float("nan") if x is None else x for x in expected]
        assert score(returns, ["a", "b", "c"], what=what) == pytest.approx(values, nan_ok=True)
    else:
        with pytest.raises(rollout.RewardError, match=f"(?s):returns, step 7.*{expected}"):
            score(returns, ["a", "b", "c"], what=what)


def test_rewards_as_people_write_them(runner, tmp_path):
    """An `async def`, a file beside the reward's own."""
    (tmp_path / "helper.py").write_text("def score(text): return float(len(text))")
    assert score(runner("later"), ["one", "four"]) == [3, 4]
    assert score(runner("helped"), ["one", "four"]) == [3, 4]


# --- numerics


def test_huge_and_tiny_rewards():
    """F41: rewards of 1e30 and a spread of 1e-12 or 1e-30: finite advantages of either sign, noise not amplified."""
    for estimator in ("grpo", "rloo", "gdpo"):
        def advantages(*rewards):
            return losses.advantages(estimator, torch.tensor([rewards], dtype=torch.float64), torch.ones(1), 4)

        huge = advantages(1e30, -1e30, 0.0, 1e30)
        assert huge.isfinite().all() and huge[0] > 0 > huge[1]
        assert (advantages(0.5, 0.5 + 1e-12, 0.5, 0.5) == 0).all()
        assert advantages(1e-30, 0.0, 0.0, 0.0).abs().max() < 1e-9


def nan_on_one_rank():
    """A gradient that is nan on rank 1 alone -> the norm that each rank sees."""
    def work(rank):
        policy = fully_shard(nn.Linear(4, 4), mesh=model.device_mesh("cpu", None))
        for p in policy.parameters():
            p.grad = torch.full_like(p, 0.0 if rank == 0 else float("nan"))
        return model.clip_grad_norm_(list(policy.parameters()), 1.0)

    return ranks(work)


def test_nan_on_one_rank_is_seen_by_all():
    """F42: the norm is that of all shards, so that no rank steps while another skips."""
    assert all(norm != norm for norm in nan_on_one_rank())


LATE_THREADS = """
import os, sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import model

bad = 0
for trial in range(4):
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/{trial}", rank=rank, world_size=2)
            group = dist.group.WORLD  # a mesh holds it past its destruction, and so its threads
            sys.setswitchinterval(100)  # a thread waits for Python's lock until somebody leaves it
            parts = [torch.zeros(1000000) for _ in range(2)]
            for _ in range(5):
                dist.all_gather(parts, torch.zeros(1000000))
            del parts
            model.end_ranks()
            sys.exit()  # with the interpreter's whole end, which multiprocessing leaves out
    bad += any([os.waitpid(child, 0)[1] for child in children])
print("aborted", bad)
"""


@pytest.mark.slow
def test_a_late_thread_aborts_no_finished_run(tmp_path):
    """F48, pytorch #179291: a thread of gloo's that lets go of a tensor after the interpreter began to end is "terminate
    called without an active exception", and torchrun calls the run failed. (Without the wait 12 of 20 trials abort.)"""
    assert "aborted 0" in run(python(), "-c", LATE_THREADS, ROOT, cwd=tmp_path)


def means_of_two_ranks(nothing=False):
    """Two ranks with 3 tokens and 1 token (or none): what each takes for the mean loss of the step."""
    def work(rank):
        values = torch.tensor([1.0, 2.0, 3.0] if rank == 0 else [] if nothing else [10.0])
        total, count = model.all_reduce_sums({"n": (float(values.sum()), float(len(values)))})["n"]
        local = 2 * values.sum() / count  # what the scripts do: times world_size, and FSDP averages
        return total / count, float(model.all_gather(local[None]).mean())

    return ranks(work)


def test_counts_are_those_of_all_ranks():
    """F44, NeMo Automodel #3830: the mean over ranks of unequal counts, or of a rank with nothing, is the mean over all
    tokens, and not world_size times a local one."""
    assert means_of_two_ranks() == [(4.0, 4.0)] * 2
    assert means_of_two_ranks(nothing=True) == [(2.0, 2.0)] * 2


def healthy(**changes):
    metrics = {"reward": 0.4, "frac_reward_zero_std": 0.3, "entropy": 0.8, "completions/clipped_ratio": 0.1,
               "sampling/sampling_logp_difference/tail": 0.01}
    return metrics | {key.replace("__", "/"): value for key, value in changes.items()}


@pytest.mark.parametrize("changes, sign, words", [
    ({}, None, ""), ({"frac_reward_zero_std": 0.95}, "spread", "95% of the groups have no spread.*mean reward 0.4"),
    ({"entropy": 0.01}, "text", "entropy 0.01 a token"),
    ({"completions__clipped_ratio": 0.6}, "text", "60% of the completions cut off"),
    ({"sampling__sampling_logp_difference__tail": 0.08}, "sampler", "8.0% of the tokens.*sampler and trainer")])
def test_signs_of_collapse(changes, sign, words):
    """D12: each of the three warnings comes from 20 steps that have its sign, by itself, and names likely causes; 19
    steps, or one odd step, say nothing. Metrics that a step lacks are no sign."""
    steps = [healthy(**changes)] * 20
    before = json.dumps(steps)
    found = train_grpo.signs_of_collapse(steps)
    assert list(found) == ([sign] if sign else []) and re.search(words, found.get(sign, ""))
    assert train_grpo.signs_of_collapse(steps[1:]) == {} and json.dumps(steps) == before
    assert train_grpo.signs_of_collapse([healthy()] * 19 + steps[:1]) == {}
    assert train_grpo.signs_of_collapse([{"step": 1}] * 20) == {}
