"""What is shipped: one top-level package, the kernels inside it, light imports; and transformers is not misled."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, *, cwd: Path = ROOT, path: str = "") -> str:
    """Standard output of a fresh interpreter."""
    import os

    env = {**os.environ, "PYTHONPATH": path} if path else dict(os.environ)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A wheel and an sdist; built without isolation where no package index can be reached."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.importorskip("setuptools", minversion="77")
        done = subprocess.run([*command, "--no-isolation"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_wheel(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fusionpass"}
    sources = {f"fusionpass/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert sources and sources <= set(names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fusionpass").rglob("*.py")}
    assert modules <= set(names)
    assert any(name.endswith("py.typed") for name in names)
    entry_points = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "[torch_dynamo_backends]\nfusionpass = fusionpass.backend:fusionpass" in entry_points
    assert "[console_scripts]\nfusionpass = fusionpass.cli:main" in entry_points


def test_wheel_imports_elsewhere(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    where = python("import fusionpass.kernels.layout as m; print(m.__file__)", cwd=tmp_path, path=str(tmp_path))
    assert where == str(tmp_path / "fusionpass/kernels/layout.py")


def test_sdist_holds_the_kernels(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    for path in (ROOT / "kernels").glob("*.py"):
        assert any(name.endswith(f"fusionpass/kernels/{path.name}") for name in names)


def test_checkout_imports_the_kernels():
    assert python("import fusionpass.kernels.layout as m; print(m.__name__)") == "fusionpass.kernels.layout"


def test_no_top_level_kernels_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import sys, fusionpass, fusionpass.ops, fusionpass.cli, fusionpass.kernels.layout; "
    assert python(code + "print('kernels' in sys.modules)") == "False"


def test_transformers_does_not_take_us_for_the_package_kernels():
    pytest.importorskip("transformers")
    code = (
        "import fusionpass, transformers; from transformers.utils.import_utils import is_kernels_available; "
        "import importlib.metadata as m; "
        "mine = [d.metadata['Name'] for d in m.distributions() if 'kernels' in (d.read_text('top_level.txt') or '').split()"
        " and d.metadata['Name'] != 'kernels']; "
        "import transformers.models.qwen2_moe.modeling_qwen2_moe; "
        "real = any(d.metadata['Name'] == 'kernels' for d in m.distributions()); "
        "print(mine, is_kernels_available() and not real)"
    )
    assert python(code) == "[] False"


LIGHT = ("triton", "transformers", "tabulate", "torch._inductor")


def test_import_is_light():
    code = "import sys, torch; before = set(sys.modules); import fusionpass; new = set(sys.modules) - before; "
    loaded = python(code + f"print([name for name in {LIGHT!r} if name in new])")
    assert loaded == "[]"
