// SPDX-License-Identifier: Apache-2.0
#include "scheduler/block_pool.h"

#include <doctest/doctest.h>

#include <set>

#include "scheduler/errors.h"

using namespace ivg;

TEST_CASE("blocks_for rounds up") {
  CHECK(blocks_for(0) == 0);
  CHECK(blocks_for(1) == 1);
  CHECK(blocks_for(16) == 1);
  CHECK(blocks_for(17) == 2);
  CHECK(blocks_for(int64_t{15} + INT32_MAX) == (1 << 27) + 1);
}

TEST_CASE("a pool gives each block once and takes it back") {
  BlockPool pool(4);
  std::set<int32_t> blocks;
  for (int i = 0; i < 4; ++i) blocks.insert(pool.allocate());
  CHECK(blocks == std::set<int32_t>{0, 1, 2, 3});
  CHECK(pool.num_free() == 0);
  CHECK_THROWS_AS(pool.allocate(), CapacityExceeded);
  pool.check_integrity();
  pool.share(2);
  CHECK(pool.ref_count(2) == 2);
  CHECK_FALSE(pool.free(2));
  CHECK(pool.free(2));
  CHECK(pool.num_used() == 3);
  CHECK(pool.allocate() == 2);
  pool.check_integrity();
}

TEST_CASE("a fork shares full blocks and copies the partly filled one") {
  BlockPool pool(8);
  const std::vector<int32_t> table = {pool.allocate(), pool.allocate(), pool.allocate()};
  std::vector<BlockCopy> copies;

  SUBCASE("n % 16 != 0: the partial block is copied, blocks reserved behind it are not taken") {
    const auto child = pool.fork(table, 20, &copies);
    REQUIRE(child.size() == 2);
    CHECK(child[0] == table[0]);
    REQUIRE(copies.size() == 1);
    CHECK(copies[0].src == table[1]);
    CHECK(copies[0].dst == child[1]);
    CHECK(pool.ref_count(table[0]) == 2);
    CHECK(pool.ref_count(table[1]) == 1);
    CHECK(pool.ref_count(child[1]) == 1);
    CHECK(pool.num_used() == 4);
  }
  SUBCASE("n % 16 == 0: nothing is copied") {
    const auto child = pool.fork(table, 32, &copies);
    CHECK(child == std::vector<int32_t>{table[0], table[1]});
    CHECK(copies.empty());
    CHECK(pool.ref_count(table[1]) == 2);
    CHECK(pool.ref_count(table[2]) == 1);
    CHECK(pool.num_used() == 3);
  }
  SUBCASE("nothing written: nothing shared") {
    CHECK(pool.fork(table, 0, &copies).empty());
    CHECK(copies.empty());
    CHECK(pool.num_used() == 3);
  }
  pool.check_integrity();
}

TEST_CASE("invalid calls throw and change nothing") {
  CHECK_THROWS_AS(BlockPool(0), InvalidParameter);
  CHECK_THROWS_AS(BlockPool(-1), InvalidParameter);
  CHECK_THROWS_AS(BlockPool(kMaxBlocks + 1), InvalidParameter);
  BlockPool pool(3);
  const int32_t used = pool.allocate();
  const int32_t unused = used == 0 ? 1 : 0;
  std::vector<BlockCopy> copies;
  for (const int32_t block : {-1, unused, 3, INT32_MAX}) {
    CAPTURE(block);
    CHECK_THROWS_AS(pool.share(block), InvalidParameter);
    CHECK_THROWS_AS(pool.free(block), InvalidParameter);
    CHECK_THROWS_AS(pool.fork({used, block}, 20, &copies), InvalidParameter);
    CHECK_THROWS_AS(pool.fork({block, used}, 20, &copies), InvalidParameter);
  }
  CHECK_THROWS_AS(pool.ref_count(3), InvalidParameter);
  CHECK_THROWS_AS(pool.fork({used}, 17, &copies), InvalidParameter);
  CHECK_THROWS_AS(pool.fork({used}, -1, &copies), InvalidParameter);
  pool.allocate();
  pool.allocate();
  CHECK_THROWS_AS(pool.fork({used, used}, 20, &copies), CapacityExceeded);
  CHECK(copies.empty());
  CHECK(pool.ref_count(used) == 1);
  CHECK(pool.num_used() == 3);
  pool.check_integrity();
}
