"""So many in a round, in the order of arrival, and those who have gone take nobody's place."""

import asyncio

from jaxserve.server.turnstile import Turnstile


def test_rounds():
    async def main():
        round_, entered = 0, []

        async def app(scope, receive, send):
            entered.append((scope["number"], round_))

        turnstile = Turnstile(app, 3)

        def one(number):
            return turnstile({"type": "http", "number": number}, None, None)

        tasks = [asyncio.ensure_future(one(number)) for number in range(10)]
        for round_ in range(1, 9):
            await asyncio.sleep(0)
            if round_ == 1:
                tasks[4].cancel()
        late = asyncio.ensure_future(one("late"))
        await late
        return entered, await asyncio.gather(*tasks, return_exceptions=True)

    entered, ended = asyncio.run(main())
    order = [number for number, _ in entered]
    assert order == [0, 1, 2, 3, 5, 6, 7, 8, 9, "late"]
    rounds = [round_ for _, round_ in entered]
    assert rounds == sorted(rounds)
    assert all(rounds.count(each) <= 3 for each in set(rounds))
    assert [isinstance(each, asyncio.CancelledError) for each in ended].index(True) == 4
