"""llama.cpp, through llama-cpp-python (extra ``llama-cpp``): imported only when it is asked for."""
