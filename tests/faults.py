"""What is promised when something goes wrong, as data: a case a line. test_faults.py runs them.

A case is a command, what happens to it, what it then does, and where that is seen: a function of
test_faults.py, or words of the name of a test that stands with its command.
"""

from typing import NamedTuple

WITHIN = 30  # seconds: no wait is longer once its own limit (G2L_WAIT, here 1 s) has passed


class Case(NamedTuple):
    command: str
    fault: str
    promise: str
    seen: str  # "fault", "kills", or "file: words of a test's name"


ENDS = "status 1, one line that names cause and remedy, no traceback; the next run ends the work"
EQUAL = "the next run ends the work; all its numbers equal those of an unbroken run"
MENDED = "named, set aside, made again by the next run of the same command"

CASES = [
    # Ended from outside.
    Case("tile", "SIGKILL at any moment", EQUAL, "kills"),
    Case("distill", "SIGKILL at any moment", EQUAL, "kills"),
    Case("distill, two ranks", "SIGKILL at any moment", EQUAL, "kills"),
    Case("evaluate", "SIGKILL at any moment", EQUAL, "kills"),
    Case("robustness", "SIGKILL at any moment", EQUAL, "kills"),
    Case("embed", "SIGKILL at any moment", EQUAL, "kills"),
    Case("distill", "SIGTERM, SIGINT, SIGUSR1", "a checkpoint, then " + EQUAL, "distill: resumed"),
    Case("distill", "a signal before the first step", "it ends at once", "distill: before_the_fir"),
    Case(
        "demo", "a signal", "the command that it runs ends first", "faults: signal_ends_the_child"
    ),
    Case(
        "any",
        "SIGKILL to the main process alone",
        "its loading processes end and its locks are free; " + EQUAL,
        "faults: main_process_killed_alone",
    ),
    Case("any", "SIGKILL to torchrun or demo alone", "what it started ends", "faults: draws_a_coh"),
    Case(
        "distill", "SIGKILL to torchrun alone", "ranks save and end", "distill: torchrun_is_killed"
    ),
    Case(
        "embed", "Ctrl-C while storage is silent", "it ends at once", "embed: ctrl_c_does_not_wait"
    ),
    Case(
        "distill", "a signal while a server is silent", "it ends at once", "ranks: not_wait_for_i"
    ),
    Case("any", "its output is closed", "said in words", "files: closed_output"),
    # Loading processes.
    Case("evaluate", "loader killed", ENDS, "fault"),
    Case("robustness", "loader killed", ENDS, "fault"),
    Case("distill", "loader killed", ENDS, "distill: loading_process_that_is_killed"),
    Case("evaluate", "loader stands still", ENDS, "fault"),
    Case("robustness", "loader stands still", ENDS, "fault"),
    Case("distill", "loader stands still", ENDS, "stream: gives_nothing_ends"),
    Case("evaluate", "no file can be opened any more", ENDS, "fault"),
    Case("robustness", "no file can be opened any more", ENDS, "fault"),
    Case("distill", "no file can be opened any more", ENDS, "stream: too_many_open_files"),
    Case("evaluate", "no process can be started", ENDS, "fault"),
    Case("robustness", "no process can be started", ENDS, "fault"),
    Case("distill", "no process can be started", ENDS, "stream: cannot_be_started"),
    Case("evaluate", "no space in /dev/shm", "none is asked for", "fault"),
    Case("robustness", "no space in /dev/shm", "none is asked for", "fault"),
    Case("distill", "no space in /dev/shm", "none is asked for", "stream: no_shared_memory"),
    # Ranks.
    Case("evaluate, two ranks", "a rank stands still", "it is named; " + ENDS, "fault"),
    Case("robustness, two ranks", "a rank stands still", "it is named; " + ENDS, "fault"),
    Case("any", "a rank stands still or ends", "the others say so and end", "ranks: does_not_come"),
    # Disk.
    Case("tile", "disk full", ENDS, "tile_command: full_disk"),
    Case("distill", "disk full", ENDS, "distill: full_disk_loses_nothing"),
    Case("distill", "no room for checkpoints", "refused before the start", "distill: room_for_ch"),
    Case("evaluate", "disk full", ENDS, "evaluate: full_disk_is_told"),
    Case("robustness", "disk full", ENDS, "fault"),
    Case("embed", "disk full", ENDS, "embed: disk_full_for_what_hdf5"),
    Case(
        "any",
        "a lock that another holds",
        "a limit, and who holds it",
        "files: who_waits_for_a_lock",
    ),
    Case("embed", "two runs at once, or Ctrl-C", "both end; " + EQUAL, "embed: two_at_once"),
    Case("any", "a file system without locks", "said once, goes on", "files: without_locks"),
    # Files of ours, damaged.
    Case("tile", "rows of slides.csv", MENDED, "tile_command: damaged_rows"),
    Case("tile", "h5 files, shards, pictures", MENDED, "tile_command: harmed_files"),
    Case("distill", "a checkpoint", "the one before it is taken", "distill: set_aside"),
    Case("distill", "every checkpoint", "said at every start", "distill: no_whole_checkpoint"),
    Case("distill", "config.json, log.jsonl", MENDED, "distill: damaged_notes"),
    Case("distill", "the student", MENDED, "distill: damaged_student"),
    Case("any", "a flipped bit of a student", "refused by name", "faults: flipped_bit_of_a_st"),
    Case("evaluate", "features, predictions, rows", MENDED, "evaluate: damaged_results"),
    Case("embed", "a flipped bit of features", MENDED, "embed: flipped_bit"),
    Case("embed", "features cut, foreign or older", "refused; --redo", "embed: damaged_or_older"),
    # Files of others.
    Case("any", "a zip file of gigabytes of zeros", "refused in seconds", "files: zip_bomb"),
    Case("embed", "NaN from a network", "left out, listed, status 1", "embed: does_not_give"),
    # Inputs that changed.
    Case("embed", "weights, or slides tiled anew", "refused; --redo", "embed: cut_anew"),
    Case("embed", "another slide at equal places", "refused; --redo", "embed: same_places"),
    Case("distill", "a cohort tiled anew", "refused on resume", "distill: tiled_anew"),
    Case("robustness", "slides swapped since tiling", "refused", "robustness: swapped"),
    Case("robustness", "weights of one name replaced", "old rows go", "robustness: other_weights"),
    Case("evaluate", "labels corrected", "old rows go", "evaluate: corrected_labels"),
]
