BEGIN;
INSERT INTO transfers
    SELECT NULL, strftime('%s', 'now'), abs(random()) % 60000, abs(random()) % 60000,
           abs(random()) % 10000, hex(randomblob(12)) FROM accounts LIMIT 10;
UPDATE accounts SET balance = balance - 1
    WHERE id IN (SELECT source FROM transfers ORDER BY id DESC LIMIT 10);
UPDATE accounts SET balance = balance + 1
    WHERE id IN (SELECT target FROM transfers ORDER BY id DESC LIMIT 10);
COMMIT;
