"""The command line: starts the processes, and speaks to them as any client would."""
