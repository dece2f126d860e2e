"""Ctrl-C at any moment at which Python can act upon a signal.

Python runs a signal's handler where a call returns, where a function begins and where a loop turns back.
"""

import dis
import functools
import itertools
import sys
from contextlib import contextmanager


@functools.cache
def places(code):
    """The offsets at which a handler may run."""
    instructions = list(dis.get_instructions(code))
    after = {
        instruction.offset
        for before, instruction in itertools.pairwise(instructions)
        if before.opname.startswith(("CALL", "RESUME"))
    }
    return after | {instruction.argval for instruction in instructions if instruction.opname.startswith("JUMP_BACK")}


@contextmanager
def interrupted(files, place):
    """Raise at that place in the files, counted from 1; the number of places passed is in the list."""
    passed = [0]

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in places(frame.f_code):
            passed[0] += 1
            if passed[0] == place:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield passed
    finally:
        sys.settrace(before)
