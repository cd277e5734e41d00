"""The compiler for GPUs that are not there: found, installed and lent to one process, by packages that are not real."""

import errno
import os
import shutil
import sys
import zipfile
from importlib.metadata import version

import pytest

from jvdiff.commands import compiler, planning
from jvdiff.errors import SetupError, UsageError
from jvdiff.plan import targets

NAMES = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt")
NAMES += ("nvidia-cuda-nvdisasm", "nvidia-cuda-cuobjdump")
LOOK = "import importlib.util, os; assert os.environ['JAX_PLATFORMS'] == 'cpu' and importlib.util.find_spec"


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch, tmp_path):
    """A machine without the compiler, and an empty cache."""
    monkeypatch.setattr(targets, "has_compiler", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PLATFORMS", os.environ["JAX_PLATFORMS"])  # check_target sets it


@pytest.fixture
def folder():
    """The compiler's folder, with a plugin that cannot do anything."""
    folder = targets.compiler_folder()
    folder.parent.mkdir(parents=True, mode=0o700)
    folder.mkdir(mode=0o700)
    plugin = folder / "jax_plugins" / "xla_cuda13"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").touch()
    return folder


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A folder of packages, from which alone pip installs."""
    index = tmp_path / "index"
    index.mkdir()
    for name in NAMES:
        stem = f"{name.replace('-', '_')}-{version('jax')}"
        with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as wheel:
            if "plugin" in name:
                wheel.writestr("jax_plugins/xla_cuda13/__init__.py", "")
            info = f"{stem}.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version('jax')}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_the_program_runs_again_where_the_compiler_is(folder):
    before = dict(os.environ)
    program = f"{LOOK}('jax_plugins.xla_cuda13'); raise SystemExit(5)"
    assert targets.run_with_compiler("h200", ["-c", program]) == 5
    assert targets.run_with_compiler("h200", ["-c", "import os; os.kill(os.getpid(), 9)"]) == 137
    assert dict(os.environ) == before and str(folder) not in sys.path


def test_a_process_that_has_the_compiler_goes_on(monkeypatch):
    monkeypatch.setattr(targets, "has_compiler", lambda: True)
    assert targets.run_with_compiler("h200", ["-c", "raise SystemExit(1)"]) is None
    targets.check_target("h200")
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_what_is_missing_is_said_with_the_command_that_helps(folder):
    with pytest.raises(UsageError, match="expected one of a100, b200, h100, h200, rtx_4090, rtx_5090"):
        targets.run_with_compiler("tpu", ["-c", ""])
    with pytest.raises(SetupError, match=r"not on the path of this process.\nStart it with: .*commands.compiler -m"):
        targets.check_target("h200")
    (folder / "jax_plugins" / "xla_cuda13").rename(folder / "half")
    for call in (lambda: targets.check_target("h200"), lambda: targets.run_with_compiler("h200", ["-c", ""])):
        with pytest.raises(SetupError, match=r"0.7 GB in .*\n.* -m jvdiff.commands.compiler --install"):
            call()


def test_what_others_can_write_is_not_run(folder):
    for place in (folder, folder.parent):
        place.chmod(0o770)
        with pytest.raises(SetupError, match=r"Expected: yours, mode 0700. Found: owner .*, mode 0770"):
            targets.run_with_compiler("h200", ["-c", ""])
        place.chmod(0o700)


def test_it_is_installed_once_and_whole(index, capfd):
    assert compiler.main(["--install"]) == 0
    folder = targets.compiler_folder()
    assert capfd.readouterr().out.endswith(f"{folder}\n")
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.glob("*.dist-info"))) == len(NAMES)
    next(index.glob("nvidia_nvvm*")).unlink()
    assert compiler.main(["--install"]) == 0  # needs no index now
    assert compiler.main(["-c", f"{LOOK}('jax_plugins.xla_cuda13'); raise SystemExit(3)"]) == 3


def test_of_two_installers_at_once_the_second_finds_it_there(index, monkeypatch):
    def rename(part, target):
        shutil.copytree(part, target)  # the other one, just before
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(targets.Path, "rename", rename)
    assert targets.install() == targets.compiler_folder()
    assert len(list(targets.compiler_folder().glob("*.dist-info"))) == len(NAMES)


def test_an_installation_that_fails_leaves_nothing(index, capfd):
    next(index.glob("nvidia_nvvm*")).unlink()
    assert compiler.main(["--install"]) == 7
    assert "was not installed: its installer ended with status 1" in capfd.readouterr().err
    assert not list(targets.compiler_folder().parent.iterdir())


@pytest.mark.parametrize("flags", [["--checkpoint=Wan2.1-T2V-1.3B-Diffusers"], ["--config=latent_video_digits"]])
def test_a_plan_is_made_by_a_process_of_its_own(folder, capfd, flags):
    """This compiler is not one, which that process finds out and says."""
    assert planning.main(["jvdiff plan", *flags, "--plan_target=h200"]) == 7
    assert "the CUDA compiler cannot be used" in capfd.readouterr().err
