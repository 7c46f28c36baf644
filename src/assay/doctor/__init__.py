"""What lies in a folder that assay wrote, what of it is damaged, and what can be mended.

    examine(path)            → Diagnosis: the rooms of the folder, and a finding for everything that is not whole
    diagnosis.mend()         → does what the findings offer, moving damaged files aside, never deleting a whole one

Examining reads every byte against its checksum and writes nothing.
"""

from assay.doctor.diagnosis import Diagnosis, Finding, Room
from assay.doctor.examine import examine

__all__ = ["Diagnosis", "Finding", "Room", "examine"]
