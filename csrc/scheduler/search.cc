#include "scheduler/search.h"
