// Subscribes with ioredis and writes down each message: its channel and its payload.
//
//     listen.js LOG ADDRESS PATTERN...

const fs = require('fs');
const Redis = require('ioredis');

const [log, address, ...patterns] = process.argv.slice(2);
const [host, port] = address.split(':');
const redis = new Redis({ host, port: Number(port) });
fs.writeFileSync(log, '');
redis.on('pmessage', (pattern, channel, message) => fs.appendFileSync(log, `${channel} ${message}\n`));
redis.psubscribe(...patterns).then(() => console.error('listening'));
