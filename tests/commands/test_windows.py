"""Windows from clips to a file, and from the file to a clip: the commands on a tiny repository."""

import hashlib
import json
import shutil

import pytest

from jvdiff import pipeline, precision
from jvdiff.commands import sample, windows

CLIP = ["--prompt=a red seven moving left", "--seed=3", "--steps=3", "--guidance=1"]


@pytest.fixture(scope="module")
def recorded(tiny_repository, tmp_path_factory):
    file = tmp_path_factory.mktemp("windows") / "windows.json"
    how = ["--tile=1x1x1", "--candidates=1x1x1,2x1x1", f"--table={file}"]
    assert windows.main(["windows", f"--checkpoint={tiny_repository}", *CLIP, *how]) == 0
    return file


def test_what_is_recorded_makes_a_clip_whose_record_names_it(tiny_repository, recorded, tmp_path, capsys, printed):
    table = json.loads(recorded.read_text())
    assert table["canvas"] == [2, 1, 1] and len(table["timesteps"]) == len(table["table"]) == 3
    assert {choice for row in table["table"] for layer in row for choice in layer} == {1}  # which leaves nothing out
    file, output = shutil.copy(recorded, tmp_path), tmp_path / "out"
    line = ["sample", f"--checkpoint={tiny_repository}", f"--output={output}", *CLIP]
    line += [f"--pattern=windows:{file}", "--dense_steps=1"]
    assert sample.main([*line, "--stop_at=2"]) == 0
    again = printed()
    (folder,) = output.glob("*.state")
    facts = json.loads((folder / "state.json").read_text())["facts"]
    digest = hashlib.sha256(recorded.read_bytes()).hexdigest()
    assert facts["pattern"] == f"windows:{file}" and facts["pattern_sha256"] == digest and facts["dense_steps"] == 1
    assert facts["checkpoint_digest"] == table["recorded"]["checkpoint_digest"]
    before = recorded.read_bytes()
    file = tmp_path / "windows.json"
    file.write_bytes(before.replace(b'"seeds"', b'"other"'))
    capsys.readouterr()
    assert sample.main(["sample", f"--checkpoint={tiny_repository}", f"--resume={folder}"]) == 3
    assert f"pattern_sha256: the state has '{digest[:40]}" in capsys.readouterr().err
    file.write_bytes(before)
    assert sample.main(again) == 0
    (record,) = output.glob("*.json")
    record = json.loads(record.read_text())
    assert record["pattern_sha256"] == digest and record["attention_chosen"] == [{"self": "xla", "cross": "xla"}] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--candidates=1x1x1,3x1x1"], "candidates has 3x1x1, and the video has 2x1x1 tiles."),
        (["--candidates=1x1"], "candidates is '1x1'; expected three whole numbers, as 6x8x8."),
        ([], "no candidates; give windows in tiles to choose among"),
        (["--candidates=1x1x1", "--mesh=data=2"], "windows are recorded on one device"),
        (["--candidates=1x1x1", "--plan=true"], "plan is of `jvdiff sample`; leave it out."),
        (["--canvas=18x48x80"], "canvas is that of a mask_strategy"),
        (["--mask_strategy=nowhere.json"], "a mask_strategy does not say of which video it is"),
        (["--mask_strategy=nowhere.json", "--canvas=18x48x80"], "mask_strategy: nowhere.json cannot be read"),
    ],
)
def test_what_cannot_be_recorded_is_a_sentence(tiny_repository, changes, message, tmp_path, capsys):
    file = tmp_path / "windows.json"
    line = ["windows", f"--checkpoint={tiny_repository}", *CLIP, "--tile=1x1x1", f"--table={file}", *changes]
    assert windows.main(line) == 2 and not file.exists()
    assert f"error: {message}" in capsys.readouterr().err


def test_a_family_without_tiles_is_said(capsys):
    line = ["windows", "--checkpoint=digits-classes", "--class_label=seven", "--candidates=1x1x1", "--tile=1x1x1"]
    assert windows.main(line) == 2
    assert "has no search for windows of tiles; there is nothing to record" in capsys.readouterr().err


def test_a_mask_strategy_becomes_a_table(tmp_path):
    file = tmp_path / "strategy.json"
    file.write_text(json.dumps({f"{t}_{i}_{h}": [3, 1, 10] for t in (0, 1) for i in (0, 1) for h in range(3)}))
    line = ["windows", f"--mask_strategy={file}", "--canvas=18x48x80", f"--table={tmp_path / 'windows.json'}"]
    assert windows.main(line) == 0
    table = json.loads((tmp_path / "windows.json").read_text())
    assert table["choices"] == [[3, 1, 10]] and table["timesteps"] is None and table["tile"] == [6, 8, 8]


@pytest.mark.parametrize("changes", [["--dense_steps=3", "--pattern=sliding_tile:1x1x1:1x1x1"]])
def test_steps_that_are_all_dense_are_refused(tiny_repository, changes, capsys):
    assert sample.main(["sample", f"--checkpoint={tiny_repository}", *CLIP, *changes]) == 2
    assert "dense_steps is 3 of 3 steps, which leaves none for the pattern" in capsys.readouterr().err


def test_dense_steps_are_a_program_of_their_own(tiny_repository):
    repository = pipeline.inspect(tiny_repository)
    family, models = repository.family, repository.models
    values = dict(steps=4, guidance=1.0, pattern="sliding_tile:1x1x1:1x1x1", dense_steps=2)
    clip, dtypes = family.clip(models, repository.settings(**values)), precision.choose("float32")
    context, params = pipeline.Context(family, models, dtypes), pipeline.abstract_params(family, models, dtypes)
    calls = pipeline.trace(context, params, clip, family.longest(models, clip, 1), last=3)
    assert [(call.stage.name, call.times) for call in calls] == [("text", 1), ("denoise 1-2", 2), ("denoise 3-4", 1)]
