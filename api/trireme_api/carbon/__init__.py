"""Carbon of a run: grid intensity by zone, embodied carbon of hardware, and the arithmetic. docs/carbon.md explains it.

    grid         grams per kWh by zone: the shipped table, the cluster's or the job's own number
    devices      what GPUs and their hosts cost to make, as a range with sources
    footprint    operational, embodied in both modes, SCI
    published    what papers have printed, to compare with
    policy       spec.carbonPolicy and what stands in status
"""

from trireme_api.carbon.devices import NOTHING as NOTHING
from trireme_api.carbon.devices import Device as Device
from trireme_api.carbon.devices import Range as Range
from trireme_api.carbon.devices import gpu as gpu
from trireme_api.carbon.devices import host as host
from trireme_api.carbon.footprint import HOURS_PER_YEAR as HOURS_PER_YEAR
from trireme_api.carbon.footprint import JOULES_PER_KILOWATT_HOUR as JOULES_PER_KILOWATT_HOUR
from trireme_api.carbon.footprint import LIFE_YEARS as LIFE_YEARS
from trireme_api.carbon.footprint import PUE as PUE
from trireme_api.carbon.footprint import UTILISATION as UTILISATION
from trireme_api.carbon.footprint import Mode as Mode
from trireme_api.carbon.footprint import embodied_share as embodied_share
from trireme_api.carbon.footprint import mass as mass
from trireme_api.carbon.footprint import operational_grams as operational_grams
from trireme_api.carbon.footprint import sci as sci
from trireme_api.carbon.grid import MAX_GRAMS_PER_KILOWATT_HOUR as MAX_GRAMS_PER_KILOWATT_HOUR
from trireme_api.carbon.grid import Intensity as Intensity
from trireme_api.carbon.grid import UnknownZone as UnknownZone
from trireme_api.carbon.grid import Zone as Zone
from trireme_api.carbon.grid import find as find
from trireme_api.carbon.grid import intensity as intensity
from trireme_api.carbon.grid import table as table
from trireme_api.carbon.published import BLOOM_SPLIT as BLOOM_SPLIT
from trireme_api.carbon.published import PUBLISHED as PUBLISHED
from trireme_api.carbon.published import Published as Published
from trireme_api.carbon.published import compared as compared
