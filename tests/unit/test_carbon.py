"""Carbon: the shipped tables, both modes of embodied carbon, and the figures that papers have printed."""

from __future__ import annotations

import math

import pytest
import yaml
from trireme_api import carbon
from trireme_api.carbon.devices import devices
from trireme_api.job import CarbonPolicy

KWH = carbon.JOULES_PER_KILOWATT_HOUR


@pytest.mark.parametrize(("megawatt_hours", "grid", "tonnes"), [(324, 231, 74.8), (1287, 429, 552.1), (433, 57, 24.7)])
def test_published_runs_come_out_as_printed(megawatt_hours: float, grid: float, tonnes: float) -> None:
    found = carbon.operational_grams(megawatt_hours * 1e3 * KWH, 1.0, grid) / 1e6
    assert found == pytest.approx(tonnes, abs=0.05)
    (printed,) = (one for one in carbon.PUBLISHED if one.megawatt_hours == megawatt_hours)
    assert found == pytest.approx(printed.tonnes, rel=0.02)


def test_blooms_split_adds_up() -> None:
    whole = sum(carbon.BLOOM_SPLIT.values())
    assert whole == next(one.tonnes for one in carbon.PUBLISHED if one.name == "BLOOM, whole")
    shares = {name: tonnes / whole for name, tonnes in carbon.BLOOM_SPLIT.items()}
    # The paper prints 14, 30 and 55 %.
    assert shares == pytest.approx({"embodied": 0.14, "dynamic": 0.30, "idle": 0.55}, abs=0.01)


def test_the_example_of_the_sci_standard() -> None:
    assert int(1_000_000 * carbon.embodied_share(3600, life_years=4)) == 28


@pytest.mark.parametrize(("years", "use", "kilograms"), [(4, 0.45, 0.127), (5, 0.60, 0.076), (3, 0.30, 0.254)])
def test_sustainable_ai_per_busy_hour(years: float, use: float, kilograms: float) -> None:
    share = carbon.embodied_share(3600, mode="busy", life_years=years, utilisation=use)
    assert 2000 * share == pytest.approx(kilograms, abs=5e-4)
    assert share * use == pytest.approx(carbon.embodied_share(3600, mode="calendar", life_years=years, utilisation=use))


def test_an_h100_hour_of_the_reviewed_figure() -> None:
    low = carbon.gpu("NVIDIA H100 80GB HBM3").embodied_kilograms.low
    assert 1000 * low * carbon.embodied_share(3600) == pytest.approx(4.7, abs=0.05)


def test_pue_is_applied_once_and_energy_only() -> None:
    assert carbon.operational_grams(KWH, 1.5, 100) == 150
    assert carbon.sci(carbon.operational_grams(KWH, 1.5, 100), 50, 2.0) == 100


@pytest.mark.parametrize("wrong", [(KWH, 0.9, 100.0), (KWH, -1.1, 100.0), (-1.0, 1.1, 100.0), (KWH, 1.1, -5.0)])
def test_what_cannot_be_gives_no_number(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="can"):
        carbon.operational_grams(*wrong)


def test_no_share_of_a_use_that_cannot_be() -> None:
    for wrong in ({"seconds": -1.0}, {"seconds": 1.0, "life_years": 0.0}, {"seconds": 1.0, "utilisation": 0.0}):
        with pytest.raises(ValueError, match="no such use"):
            carbon.embodied_share(**wrong)
    with pytest.raises(ValueError, match="functional unit"):
        carbon.sci(1.0, 1.0, 0.0)


def test_norway_is_not_false() -> None:
    with pytest.raises(ValueError, match="NOR"):
        CarbonPolicy.model_validate(yaml.safe_load("zone: NO"))
    assert CarbonPolicy.model_validate(yaml.safe_load("zone: 'NO'")).zone == "NO"


def test_a_pue_below_one_is_refused_by_name() -> None:
    for pue in (-1.0, 0.9, math.nan):
        with pytest.raises(ValueError, match="pue"):
            CarbonPolicy(pue=pue)


# --- the tables -----------------------------------------------------------------------------------------------------


def test_the_grid_table_is_whole_and_dated() -> None:
    table = carbon.table()
    assert len(table) == 263
    assert all(0 < zone.grams_per_kilowatt_hour < carbon.MAX_GRAMS_PER_KILOWATT_HOUR for zone in table.values())
    assert all(2021 <= zone.year <= 2025 and zone.intensity.source for zone in table.values())
    assert len({zone.iso3 for zone in table.values() if zone.iso3}) == sum(bool(zone.iso3) for zone in table.values())


@pytest.mark.parametrize(
    ("zone", "grams"),
    [
        ("US", 369.5), ("FR", 56.0), ("DE", 381.0), ("GB", 237.6), ("SE", 40.7), ("NO", 30.1), ("CN", 582.3),
        ("IN", 713.4), ("PL", 661.9), ("CA", 170.0), ("JP", 485.4), ("IE", 290.8), ("WORLD", 458.0), ("US-WV", 893.1),
    ],
)
def test_known_zones(zone: str, grams: float) -> None:
    found = carbon.intensity(zone.lower())
    assert found is not None
    assert found.grams_per_kilowatt_hour == pytest.approx(grams, abs=0.11)
    assert str(carbon.find(zone).year) in found.source


def test_zones_and_what_goes_before_the_table() -> None:
    assert carbon.intensity(None) is None
    assert carbon.intensity("swe") == carbon.intensity("SE")
    own = carbon.intensity("swe", None, {"SE": 12.0})
    given = carbon.intensity("XX", 7.0, {"SE": 12.0})
    assert own is not None
    assert given is not None
    assert (own.grams_per_kilowatt_hour, given.grams_per_kilowatt_hour) == (12, 7)
    assert "cluster" in own.source
    with pytest.raises(carbon.UnknownZone, match="gramsPerKilowattHour"):
        carbon.intensity("XX")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA B200", "NVIDIA B200"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 SXM"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100 PCIe"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 PCIe"),
        ("Tesla V100-SXM2-32GB", "NVIDIA V100 SXM2"),
        ("Tesla T4", "NVIDIA T4"),
        ("NVIDIA T400 4GB", "any other GPU"),
        ("NVIDIA GB200", "any other GPU"),
        ("NVIDIA GeForce RTX 4090", "any other GPU"),
        (None, "any other GPU"),
    ],
)
def test_devices_by_the_drivers_names(model: str | None, name: str) -> None:
    assert carbon.gpu(model).name == name


def test_every_device_is_a_range_with_a_source() -> None:
    for device in devices():
        made = device.embodied_kilograms
        assert 0 < made.low <= made.mid <= made.high
        assert made.low < made.high
        assert device.source
    assert carbon.host(8).name != carbon.host(0).name


def test_ranges_add_and_scale() -> None:
    whole = carbon.gpu("NVIDIA H100 80GB HBM3").embodied_kilograms * 8 + carbon.host(8).embodied_kilograms
    assert whole == carbon.Range(1312 + 1000, 8 * 307 + 1523, 8 * 575 + 3688)
    assert whole + carbon.NOTHING == whole


@pytest.mark.parametrize(("grams", "text"), [(0.421, "0.421g"), (3100, "3.1kg"), (74.8e6, "74.8t")])
def test_masses(grams: float, text: str) -> None:
    assert carbon.mass(grams) == text


def test_a_footprint_beside_those_published() -> None:
    assert carbon.compared(0.75)["OPT-175B"] == pytest.approx(100)
    assert carbon.compared(0.0) == {}
