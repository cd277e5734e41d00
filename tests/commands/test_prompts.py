"""Prompts files as people have them: what they ask for, and what is refused, before any weight is read."""

import json
from types import SimpleNamespace

import pytest

from jvdiff import pipeline
from jvdiff.commands import command_line, one_video, sample

RED, BLUE = "a red seven", "a blue two"
ROWS = [{"prompt": RED, "seed": 5}, {"prompt": BLUE, "id": "b", "steps": 2}]


@pytest.fixture
def asked(tiny_repository, tmp_path, monkeypatch, capsys):
    """asked(file's name, its content, **fields) -> (exit status, [(prompt, seed, name, steps)], stderr)."""
    jobs = []
    loaded = SimpleNamespace(weights=SimpleNamespace(in_turn=()))
    monkeypatch.setattr(pipeline, "load", lambda *args, **how: loaded)
    monkeypatch.setattr(one_video, "make", lambda maker, job, seconds: jobs.append(job) or [])

    def ask(name, content, **fields):
        jobs.clear()
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        given = {"checkpoint": tiny_repository, "output": tmp_path / "out", "prompts": file}
        monkeypatch.setattr(
            "jvdiff.commands.batches.Batch.turns", lambda batch, *args: (e for e in enumerate(batch.jobs))
        )
        flags = [f"--{field}={value}" for field, value in (given | fields).items()]
        code = sample.main(["jvdiff sample", *flags])
        return code, [(j.subject, j.seed, j.stem, j.clip.settings.steps) for j in jobs], capsys.readouterr().err

    return ask


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", lines(*ROWS)),
        ("p.JSONL", "\r\n\r\n".join(lines(*ROWS).splitlines())),
        ("p.ndjson", "\ufeff" + lines(*ROWS)),
        ("p.jsonl", lines(*ROWS).encode("utf-16")),
        ("p.json", json.dumps(ROWS, indent=1)),
        ("p.Json", json.dumps(ROWS).encode("utf-16")),
        ("p.csv", f"prompt,seed,id,steps\n{RED},5,,\n,,,\n{BLUE},,b,2\n"),
        ("p.CSV", f'\ufeffid,steps,prompt,seed\r\n,,"{RED}",5\r\nb,2,"{BLUE}",\r\n'),
        ("p.csv", f"id,steps,prompt,seed\r,,{RED},5\r\rb,2,{BLUE},".encode("utf-16")),
    ],
)
def test_the_same_entries_in_every_format(asked, name, content):
    code, jobs, said = asked(name, content, seed=7)
    assert (code, jobs) == (0, [(RED, 5, "a-red-seven_seed5", 4), (BLUE, 8, "b", 2)]), said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", f"{RED}\n\n  {BLUE}"),
        ("p", f"{RED}\r{BLUE}\r"),
        ("p.TXT", f"{RED}\r\n{BLUE}\r\n".encode("utf-16-be").join([b"\xfe\xff", b""])),
        ("p.json", json.dumps([RED, {"prompt": BLUE}])),
        ("two.txt", f"\ufeff{RED}\n\ufeff{BLUE}\n"),  # two files with marks, joined
    ],
)
def test_texts(asked, name, content):
    code, jobs, said = asked(name, content, seed=7)
    assert (code, [job[:2] for job in jobs]) == (0, [(RED, 7), (BLUE, 8)]), said


def test_a_comment_is_no_prompt_and_that_is_said_once(asked):
    code, jobs, said = asked("p.txt", f"# colours\n{RED}\n#\n# more\n#{BLUE}\n a # b\n", seed=0)
    assert code == 0 and [job[:2] for job in jobs] == [(RED, 0), (f"#{BLUE}", 1), ("a # b", 2)]
    assert said.count("3 lines that begin with '# ' are comments; they were prompts until now") == 1
    assert "comment" not in asked("p.txt", RED)[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.tsv", "prompt\tseed\n", "ends in .tsv; expected no suffix or .txt (text), .jsonl or .ndjson, .json"),
        ("p.txt.gz", b"\x1f\x8b", "ends in .gz"),
        ("p.json", lines(*ROWS), "is not JSON: Extra data at line 2, character 1."),
        ("p.json", json.dumps(ROWS[0]), "is not a JSON array; objects that stand one on a line are a .jsonl file"),
        ("p.json", f'["{RED}", ' + "[" * 100_000, "p.json is nested too deeply, and its array does not end"),
        ("p.json", "[" * 2000 + "]" * 2000 + "[]", "p.json is not JSON: something stands behind its array."),
        ("p.json", '{"a": ' + "[" * 100_000, "is not a JSON array"),
        ("p.json", "[]", "holds no prompt"),
        ("p.csv", f"{RED},5\n", "line 1, which names the columns: unknown column"),
        ("p.csv", "prompt;seed\n", "unknown column prompt;seed (did you mean prompt?)"),
        ("p.csv", "prompt,prompt\na,b\n", "names a column twice"),
        ("p.csv", '"prompt', "is not CSV"),
        ("p.csv", "prompt,seed\n", "holds no prompt"),
        ("p.txt", "# a\n\n", "holds no prompt"),
        ("p.txt", RED.encode("utf-16")[:-1], "is UTF-16 and ends within a character"),
        ("p.txt", RED.encode("utf-32"), "is UTF-32"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(asked, name, content, message):
    code, jobs, said = asked(name, content)
    assert (code, jobs) == (2, []) and message in said and len(said.splitlines()) <= 6


DIGITS = "1" * 5000
BAD = {
    f'{{"prompt": "a", "seed": {DIGITS}}}': "seed is inf; expected a finite number",
    '{"prompt": "a", "guidance": 1%s}' % ("0" * 400): "guidance is inf",
    '{"prompt": "a", "guidance": NaN}': "guidance is nan",
    '{"prompt": "a", "steps": 1e400}': "steps is inf",
    '{"prompt": "a", "steps": 12345678901234567890123}': "steps is 1",
    '{"prompt": "a", "shift": [1]}': "shift is [1]",
    '{"prompt": "a", "solver": {"a": 1}}': "solver is {'a': 1}",
    '{"prompt": "a", "prompt": "b"}': "says prompt more than once",
    '{"prompt": "a", "id": "%s"}' % ("漢" * 100): "has 300 bytes; a name of files has at most 200",
    '{"prompt": "a", "id": "X.Preview"}': "ends in what names other files: .preview",
    '{"prompt": "a", "id": "GOOD"}': "was used on an earlier line as 'good', and not every file system",
    '{"prompt": "a", "id": "good"}': "id 'good' was used on an earlier line.",
    '{"prompt": "a\\ud800"}': "half a surrogate pair",
    '"a"': "is 'a', not a JSON object",
    '{"prompt": "a"': "is not JSON: Expecting ',' delimiter at character 15",
    "[" * 100_000: "is nested too deeply",
    '{"prompt": "\x00"}': "holds U+0000, which is not text",
}


def test_a_bad_line_fails_alone_and_keeps_its_seed(asked):
    """Mended, it is made with the seed that it has here, and nobody else's changes."""
    content = "\n".join(
        [json.dumps({"prompt": RED, "id": "good"}), *BAD, "", json.dumps({"prompt": BLUE, "id": "CON"})]
    )
    code, jobs, said = asked("p.jsonl", content, seed=10)
    assert code == 3 and jobs == [(RED, 10, "good", 4), (BLUE, 11 + len(BAD), "CON", 4)]
    for number, message in enumerate(BAD.values(), 2):
        assert any(f"p.jsonl line {number}: " in line and message in line for line in said.splitlines()), (
            number,
            message,
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", f'[{"[" * 2000 + "]" * 2000}, {{"prompt": "{RED}"}}]', "entry 1: is nested too deeply."),
        (
            "p.json",
            f'["un sept \xe9l\xe9gant", "{RED}"]'.encode("latin-1"),
            "entry 1: holds the byte 0xe9, which is not text",
        ),
        ("p.json", f'["a\tb\\"]", "{RED}"]', "entry 1: is not JSON: Invalid control character at character 3."),
        ("p.txt", b"un sept \xe9l\xe9gant\n" + RED.encode(), "p.txt line 1: holds the byte 0xe9"),
        ("p", json.dumps(ROWS[0]) + f"\n{RED}", "p line 1: is a JSON object in a file of texts; name the file .jsonl"),
        ("p.csv", f'prompt,steps\n"a"b,3\n{RED},\n', "line 2: is not CSV"),
        ("p.csv", f"prompt,steps\na,3,4\n{RED},\n", "line 2: has 3 cells, the header 2"),
        ("p.csv", f"prompt,steps\na,{DIGITS}\n{RED},none\n", "line 2: steps is '111"),
        ("p.csv", f"prompt,seed\na,x\n{RED},\n", "line 2: seed is 'x'; expected a whole number"),
    ],
)
def test_a_bad_line_of_other_formats(asked, name, content, message):
    code, jobs, said = asked(name, content, seed=3)
    assert code == 3 and [job[:2] for job in jobs] == [(RED, 4)] and message in said


def test_a_prompt_does_not_command_the_terminal(capsys):
    command_line.say("prompt: \x1b]0;title\x07 猫\n")
    assert capsys.readouterr().err == "prompt: \\x1b]0;title\\x07 猫\n\n"


def test_seeds_make_every_line_that_often(asked):
    content = lines({"prompt": RED}, {"prompt": BLUE, "id": "b"}, {"prompt": RED, "seed": 3})
    code, jobs, said = asked("p.jsonl", content, seeds="2:4")
    assert code == 3 and "line 3: seed is 3, and --seeds=2:4; leave one of them out" in said
    assert [job[1:3] for job in jobs] == [
        (2, "a-red-seven_seed2"),
        (3, "a-red-seven_seed3"),
        (2, "b_seed2"),
        (3, "b_seed3"),
    ]
    assert [job[1] for job in asked("p.txt", RED, seeds="3,8,5")[1]] == [3, 8, 5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": "0:4", "seed": 1}, "seed is 1, and seeds 0:4; leave one of them out"),
        ({"seeds": "16"}, "expected 0:16 for sixteen from 0 to 15"),
        ({"seeds": "4:4"}, "expected 1 to 10000 of them"),
        ({"seeds": "3,3"}, "each once"),
        ({"seeds": "4294967296,1"}, "seed is 4294967296"),
        ({"seeds": "0:99999999"}, "expected 1 to 10000"),
        ({"part": "0/4"}, "expected 1/16 for the first of sixteen"),
        ({"part": "5/4"}, "expected 1/16"),
        ({"part": ""}, "expected 1/16"),
    ],
)
def test_seeds_and_parts_that_cannot_be(asked, fields, message):
    code, jobs, said = asked("p.txt", RED, **fields)
    assert (code, jobs) == (2, []) and message in said


def test_parts_share_the_lines_and_their_problems(asked):
    content = "\n".join([json.dumps({"prompt": f"{RED} {i}"}) for i in range(4)] + ["{"])
    parts = [asked("p.jsonl", content, seed=0, part=f"{i}/3") for i in (1, 2, 3)]
    assert [[job[1] for job in jobs] for _, jobs, _ in parts] == [[0, 3], [1], [2]]
    assert [code for code, *_ in parts] == [0, 3, 0]
    every = [job[1:3] for i in (1, 2) for job in asked("p.txt", RED, seeds="0:3", part=f"{i}/2")[1]]
    assert every == [(0, "a-red-seven_seed0"), (2, "a-red-seven_seed2"), (1, "a-red-seven_seed1")]
