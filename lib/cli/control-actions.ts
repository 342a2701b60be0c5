/** What the commands do that make, remove and find devices. */

import type { Wait } from '../common/deadline.ts'
import { LoopControl } from '../control.ts'
import { boundOf, type Common, Exit, interruptible, print, printJson, report } from './terminal.ts'

export async function addAction(number: number | undefined, { json, timeout }: Common): Promise<void> {
  await interruptible(async (signal) => {
    const left = boundOf(timeout, signal)
    await printDevice(await withControl(left, (control) => control.add(number, left())), json)
  })
}

export async function removeAction(numbers: number[], { json, timeout }: Common): Promise<void> {
  await interruptible((signal) =>
    withControl(boundOf(timeout, signal), async (control) => {
      const removed: number[] = []
      let status = 0
      for (const number of numbers) {
        try {
          removed.push(await control.remove(number, boundOf(timeout, signal)()))
        } catch (error) {
          status = report(error, json === true)
          if (signal.aborted) break
        }
      }
      if (json) await printJson(removed.map((number) => ({ number, path: `/dev/loop${number}` })))
      if (status !== 0) throw new Exit(status)
    }),
  )
}

export async function freeAction({ json, timeout }: Common): Promise<void> {
  await interruptible(async (signal) => {
    const left = boundOf(timeout, signal)
    await printDevice(await withControl(left, (control) => control.getFree(left())), json)
  })
}

function printDevice(number: number, json: true | undefined): Promise<void> {
  const path = `/dev/loop${number}`
  return json ? printJson({ number, path }) : print(`${path}\n`)
}

async function withControl<T>(left: () => Wait, operation: (control: LoopControl) => Promise<T>): Promise<T> {
  const control = await LoopControl.open(left())
  try {
    return await operation(control)
  } finally {
    await control.close()
  }
}
