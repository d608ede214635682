#include "scheduler/block_pool.h"
