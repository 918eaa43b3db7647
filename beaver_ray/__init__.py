"""The method, in plain torch, numpy and Arrow."""

import logging

# DeepSpeed says on stdout that it found no GPU, in whichever process imports it first, and more that nobody can mend.
# It sets its logger's level itself, but keeps filters.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
