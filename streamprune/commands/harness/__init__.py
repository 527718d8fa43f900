"""Run lm-evaluation-harness on a streamed model, with the requests of all tasks scored in one sweep."""
