"""Several recipes at an equal budget of tokens: what runs, what came out, how it is shown."""
