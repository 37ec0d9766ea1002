"""`python -m decode_worker`: a decode worker as a process."""

import gc

from shared.arguments import parse_arguments, set_threads

if __name__ == "__main__":
    arguments = parse_arguments("decode_worker")
    set_threads(arguments.config.threads)  # before torch is imported
    gc.disable()  # nothing of what is imported is garbage: `run_worker` turns it on
    from decode_worker.service import create_role
    from shared.worker import run_worker

    run_worker("decode_worker", arguments, arguments.config.decode, create_role)
