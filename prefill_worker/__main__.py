"""`python -m prefill_worker`: a prefill worker as a process."""

import gc

from shared.arguments import parse_arguments, set_threads

if __name__ == "__main__":
    arguments = parse_arguments("prefill_worker")
    set_threads(arguments.config.threads)  # before torch is imported
    gc.disable()  # nothing of what is imported is garbage: `run_worker` turns it on
    from prefill_worker.service import create_role
    from shared.worker import run_worker

    run_worker("prefill_worker", arguments, arguments.config.prefill, create_role)
