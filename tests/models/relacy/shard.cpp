// The walkers' engine, on Relacy.
#include "tests/models/relacy/shim.hpp"

#include "service/engine/shard.cpp"
