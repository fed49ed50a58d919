"""Every planted bug."""

from tests.validation.faults import (
    analysis,
    connectors,
    decoder,
    generation,
    loading,
    positions,
    precision,
    preparing,
    vision,
)

PARTS = (loading, preparing, vision, connectors, positions, decoder, precision, analysis, generation)
FAULTS = tuple(fault for part in PARTS for fault in part.FAULTS)

# Those that every run of the tests plants: at least one of each phase but edits, whose many programs take long to
# compile, on few variants. The others are slow.
QUICK = frozenset(
    (
        "gate and up exchanged at load",
        "images as bgr",
        "gelu where clip has quick gelu",
        "projector bias dropped",
        "positions counted from one",
        "one future position seen",
        "rms norm epsilon of the config ignored",
        "final norm applied twice",
        "answer read one position late",
        "hellinger without roots",
        "generated tokens one position early",
    )
)
