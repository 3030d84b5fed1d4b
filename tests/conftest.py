"""What every test shares: no test reads or writes the state of a real yard or a real Airflow."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from tests.s3 import s3_server, s3_settings, settings

__all__ = ["s3_server", "s3_settings", "settings"]

# Two processes whose threads wait by spinning take each other's cores, many times over. Read when
# torch is loaded, by everything that the tests start as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A busy machine makes any example slow; that is no fault of what is tested.
hypothesis_settings.register_profile(
    "sailyard", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("sailyard")

# Airflow reads its place when it is imported, so this cannot wait for a fixture.
_AIRFLOW_HOME = tempfile.mkdtemp(prefix="sailyard-airflow-")
atexit.register(shutil.rmtree, _AIRFLOW_HOME, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith("AIRFLOW_")]:
    del os.environ[_name]
os.environ.update(
    AIRFLOW_HOME=_AIRFLOW_HOME,
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__DAGS_FOLDER=str(Path(__file__).parents[1] / "dags"),
)


@pytest.fixture(autouse=True)
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point SAILYARD_HOME at a temporary folder and drop every other SAILYARD_ variable."""
    for name in [name for name in os.environ if name.startswith("SAILYARD_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    monkeypatch.setenv("SAILYARD_HOME", str(home))
    return home
