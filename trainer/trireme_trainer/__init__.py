"""The FSDP trainer. Never imports kopf or kubernetes."""
