"""How many bytes are alive when: of a schedule that is planned, and of the code that will run.

`liveness` gives a `timeline` for a `schedule`, with what kernels take (`workspace`) and what
copies make a step wait for (`transfers`). `certify` reads the peak off emitted code, by `replay`
with a `meter`; `ledger` knows what earlier graphs of the step hold.
"""
