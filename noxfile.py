"""Install the wheel in clean environments, with the oldest and the newest dependencies that pyproject.toml allows.

    nox -s installed                                   # every Python that is installed; the others are skipped
    nox -s "installed-3.11(versions='oldest')"         # one environment
    nox -s installed -- -k config                      # arguments after -- are for pytest

Needs uv, which resolves to the oldest versions. On a machine without a GPU, UV_TORCH_BACKEND=cpu takes the PyTorch
build without CUDA.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import nox

nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["installed"]
ROOT = Path(__file__).parent
# These need the source tree.
OF_SOURCES = ("test_packaging.py", "test_structure.py")


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
@nox.parametrize("versions", ["oldest", "newest"])
def installed(session: nox.Session, versions: str) -> None:
    """Build the wheel, install it, run the quickstart from it and pass the tests."""
    # uv resolves to the oldest versions only what is named directly, so not the requirements of the wheel.
    requirements = ("--requirements", str(ROOT / "pyproject.toml"), "--extra", "dev")
    resolution = {"oldest": "lowest-direct", "newest": "highest"}[versions]
    with TemporaryDirectory() as folder, session.chdir(folder):
        session.run_install("uv", "build", "--out-dir", "dist", str(ROOT), external=True)
        (wheel,) = Path("dist").glob("*.whl")
        session.install("--resolution", resolution, *requirements, str(wheel))
        session.run("elo", "doctor")
        session.run("elo", "quickstart", "--set", "budgets=[{tokens: 20000}]")
    tests = ROOT / "tests"
    left_out = [f"--ignore={tests / name}" for name in OF_SOURCES]
    session.run(
        *("python", "-m", "pytest", "-n", "auto", "--dist", "loadfile", *left_out, str(tests), *session.posargs),
    )
