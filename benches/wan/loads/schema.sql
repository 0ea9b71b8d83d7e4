-- A small bank: 60,000 accounts, about 13 MB with its index.
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA cache_size = -32768;
CREATE TABLE accounts (
    id INTEGER PRIMARY KEY, owner TEXT, branch INTEGER, balance INTEGER, note TEXT);
CREATE TABLE transfers (
    id INTEGER PRIMARY KEY, at INTEGER, source INTEGER, target INTEGER,
    amount INTEGER, reference TEXT);
INSERT INTO accounts
    WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n LIMIT 60000)
    SELECT i, 'customer ' || (i * 7919 % 60000) || ' of branch ' || i % 97, i % 97,
           abs(random()) % 1000000, 'opened by letter, reference ' || hex(randomblob(16)) FROM n;
CREATE INDEX by_branch ON accounts (branch, balance);
