"""The contracts of npu-zoo: plain data and interfaces, free of torch and of the rest of the package."""
